#!/usr/bin/env bash
# Installs what pyproject.toml lists, at the versions of requirements.lock (once), prepares the corpus and trains.
# Needs only Python 3.11 to 3.14 and a package index.
#
#   ./run.sh                           with GPUs: configs/ljspeech.yaml on all of them; without: configs/demo.yaml on the CPU
#   ./run.sh --gpus N                  on N GPUs, a rank on each, or not at all; 0 = the CPU
#   ./run.sh --cpus N                  without a GPU: N ranks of one thread each; by default as many as cores: 2, 4 or 8
#   ./run.sh --device mps              on the GPU of a Mac
#   ./run.sh --config configs/x.yaml   another recipe
#   ./run.sh --global_batch 128 ...    --key value for any knob: train.py --help lists them
#   ./run.sh --batch_size 32 ...       clips a GPU takes at once, instead of its share of the recipe's global_batch
#   ./run.sh --wandb-url URL           log to a W&B server of your own
#   ./run.sh --nodes N --node_rank R --master HOST[:PORT]     the same on each of N machines, R from 0; HOST is machine 0
#   ./run.sh --print ...               print the commands instead of running them
#   ./run.sh test [pytest arguments]   the tests
#   ./run.sh lock [--upgrade]          requirements.lock again, after pyproject.toml was changed; --upgrade: all to their newest; needs uv
#
# BATCH_SIZE=64 NUM_GPUS=2 NUM_CPUS=1 CONFIG=configs/x.yaml ./run.sh says it by environment; options win.
# VENV=/somewhere ./run.sh keeps the environment there instead of in .venv. uv installs where it is on PATH, else pip; both heed
# PIP_INDEX_URL, and each its own variables.

case ${BASH_VERSION:+$SHELLOPTS} in "" | *posix*) exec bash +o posix "$0" "$@" ;; esac      # as sh run.sh

set -euo pipefail
unset CDPATH PYTHONDONTWRITEBYTECODE      # containers often set it: then each start compiles torch again, 6 s of it
here=${BASH_SOURCE[0]}
while [[ -L $here ]]; do
    cd "$(dirname "$here")"
    here=$(readlink "$(basename "$here")")
done
cd "$(dirname "$here")"
VENV=${VENV:-.venv}

main() {
    if [[ ${1:-} == test ]]; then
        set_up test
        export OMP_WAIT_POLICY=PASSIVE                       # idle threads sleep: spinning ones slow each other down
        export OMP_NUM_THREADS=1                             # two processes of one thread each, a file of tests at a time
        exec "$VENV/bin/python" -m pytest -q -n 2 --dist loadfile "${@:2}"
    fi
    if [[ ${1:-} == lock ]]; then
        command -v uv >/dev/null || die "uv is not installed: pip install uv"
        exec uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras --no-emit-index-url \
            --no-annotate pyproject.toml -o requirements.lock "${@:2}"
    fi
    read_options "$@"
    [[ $print ]] || set_up
    ((gpus)) || run export OMP_WAIT_POLICY=PASSIVE
    [[ $device != mps ]] || run export PYTORCH_ENABLE_MPS_FALLBACK=1       # what Metal has not is computed on the CPU
    # on all machines, or on none
    run "$VENV/bin/python" ${together[@]+"${together[@]}"} system.py prepare ${ranks:+--ranks "$ranks"} "${arguments[@]}"
    run exec "$VENV/bin/python" ${launcher[@]+"${launcher[@]}"} train.py "${arguments[@]}"     # exec: train.py gets the signals
}

read_options() {        # sets gpus, ranks, device, print, together, launcher, arguments; macOS's bash 3.2 takes empty arrays for unset, hence the ${a[@]+...}
    local config=${CONFIG:-} nodes=1 node_rank=0 master= overrides=() available cores cpus= key value
    available=$(count_gpus) gpus= device= print= together=() launcher=()
    [[ -z ${BATCH_SIZE:-} ]] || overrides+=(--batch_size "$BATCH_SIZE")
    while (($#)); do
        case $1 in
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run.sh; exit ;;
            --print) print=1; shift; continue ;;
            --?*=*) key=${1%%=*} value=${1#*=}; shift ;;
            --?*) (($# > 1)) || die "$1: its value is missing"; key=$1 value=$2; shift 2 ;;
            *) die "'$1': expected --key value, as ./run.sh --help shows" ;;
        esac
        case ${key//-/_} in
            __gpus) gpus=$value ;;
            __cpus) cpus=$value ;;
            __device) device=$value ;;
            __config) config=$value ;;
            __nodes) nodes=$value ;;
            __node_rank) node_rank=$value ;;
            __master) master=$value ;;
            __wandb_url) overrides+=(--wandb_url "$value" --wandb online) ;;
            *) overrides+=("$key" "$value") ;;
        esac
    done
    case $device in
        cpu | mps) gpus=${gpus:-0} ;;
        *) gpus=${gpus:-${cpus:+0}} gpus=${gpus:-${NUM_GPUS:-$available}} ;;
    esac
    for value in "$gpus" "${cpus:-0}" "$nodes" "$node_rank"; do
        [[ $value =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "--gpus, --cpus, --nodes and --node_rank are whole numbers, got '$value'"
    done
    case $device in cpu | mps) ((gpus == 0)) || die "--gpus $gpus and --device $device: only one of them" ;; esac
    ((gpus <= available)) || die "--gpus $gpus: there are $available here (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
    [[ ! $cpus ]] || ((!gpus)) || die "--cpus $cpus and --gpus $gpus: only one of them"
    ranks=$gpus                                          # of this machine
    if ((!gpus)); then
        cpus=${cpus:-${NUM_CPUS:-}}
        [[ $cpus != 0 ]] || die "--cpus 0: at least 1"
        cores=$(OMP_NUM_THREADS='' nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
        ranks=${cpus:-$((cores < 2 ? 1 : cores < 4 ? 2 : cores < 8 ? 4 : 8))}
        [[ $cpus || $device != mps && $nodes == 1 ]] || ranks=1
    fi
    ((node_rank < nodes)) || die "--node_rank $node_rank must be below --nodes $nodes"
    if ((nodes > 1)); then
        [[ $master ]] || die "--nodes $nodes: --master HOST[:PORT] is missing"
        [[ $master == *:* ]] || master+=:29500
        together=(launch.py --nodes "$nodes" --node_rank "$node_rank" --master "$master")
        launcher=("${together[@]}" --ranks "$ranks")
    elif ((ranks > 1)); then
        launcher=(launch.py --ranks "$ranks")
    fi
    ranks=$((nodes * ranks))
    ((ranks > 1)) || ranks=
    if ((gpus)); then arguments=(--config "${config:-configs/ljspeech.yaml}" --device "${device:=cuda}")
    else arguments=(--config "${config:-configs/demo.yaml}" --device "${device:=cpu}"); fi
    arguments+=(${overrides[@]+"${overrides[@]}"})
}

count_gpus() {
    local present visible
    present=$(nvidia-smi -L 2>&1 | grep -c -e '^GPU ' -e 'version mismatch') || true         # as device.py counts them
    visible=$(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES-all}" | grep -c '^[^-]') || true       # "" and -1 hide them all
    [[ ${CUDA_VISIBLE_DEVICES+set} ]] && ((visible < present)) && present=$visible
    echo "$present"
}

set_up() {              # [extra]; a stamp in the environment says that its installation was finished
    up_to_date "$@" || (
        if command -v flock >/dev/null; then flock 9; fi     # of two starts at once the second waits
        up_to_date "$@" || install "$@"
    ) 9<run.sh
}

up_to_date() {
    local finished=$VENV/installed${1:+-$1}
    [[ -f $finished && $(<"$finished") == "$(stamp)" ]]
}

stamp() {
    echo "$(<pyproject.toml)"
    echo "$(<requirements.lock)"
}

install() {
    local extra=${1:-} package missing=
    if [[ -e $VENV/unfinished ]]; then
        say "the installation in $VENV was interrupted: starting over"
        rm -rf "$VENV"
    fi
    [[ -e $VENV ]] || make_environment
    [[ -x $VENV/bin/python ]] || die "$VENV has no Python: delete it, or choose another place by VENV="
    say "installing the dependencies${extra:+ and those of '$extra'} (a few minutes, some GB the first time)"
    rm -f "$VENV"/installed*
    requirements dependencies $extra >"$VENV/requirements.txt"
    add -r "$VENV/requirements.txt"
    say "installing the voice and the judge of the demos (some 170 MB the first time)"
    while read -r package; do
        add "$package" </dev/null || missing+=" ${package%%[<>=]*}"
    done < <(requirements demo) >"$VENV/demo.log" 2>&1
    [[ -z $missing ]] || say "going on without what cannot be installed:$missing (why: $VENV/demo.log)"
    if [[ $extra == test ]]; then      # --no-deps: of what it asks for, its generator needs only librosa
        add --no-deps bigvgan==2.4.1 || say "bigvgan cannot be installed: the tests that compare with it are skipped"
        stamp >"$VENV/installed-test"
    fi
    stamp >"$VENV/installed"
    rm -f "$VENV/unfinished"
}

make_environment() {
    local python
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    mkdir -p "$VENV" && touch "$VENV/unfinished"
    "$python" -m venv "$VENV"
}

requirements() {        # "dependencies" or an extra, ...: its lines in pyproject.toml
    "$VENV/bin/python" - "$@" <<'PYTHON'
import sys, tomllib
with open("pyproject.toml", "rb") as f:
    project = tomllib.load(f)["project"]
lists = {"dependencies": project["dependencies"], **project.get("optional-dependencies", {})}
for name in sys.argv[1:]:
    for requirement in lists.get(name, []):
        print(requirement)
PYTHON
}

add() {                 # what pip install takes
    [[ -z ${PIP_INDEX_URL:-} ]] || local -x UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
    if command -v uv >/dev/null; then
        uv pip install --python "$VENV/bin/python" -c requirements.lock "$@" && return
        say "uv could not: trying pip"
    fi
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile -c requirements.lock "$@"
}

find_python() {         # those that torch has wheels for
    local python
    for python in python3.12 python3.13 python3.11 python3.14 python3; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no Python 3.11 to 3.14 with venv: install one (apt install python3.12-venv, brew install python@3.12)"
}

run() { if [[ $print ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
say() { echo "==> $*"; }
die() { echo "error: $*" >&2; exit 2; }

main "$@"
