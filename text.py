"""Text as people type it, as words: "Dr. Li paid $3.50." -> "Doctor Li paid three dollars and fifty cents."

American English in LJSpeech's manner: no "and" within a number, years in pairs; 5/12/1999 is May. Each kind
of writing is a pattern and a function of its match, in the order of PATTERNS at the end. What none of them
knows stays as typed. So do letters, spoken one by one or as a word (USA, NASA, U.S., J. R., p.m.), accents,
brackets and quotation marks. Only the last part of a pattern repeats without limit: no text is slow.
"""

import datetime
import re
import unicodedata
from collections.abc import Callable, Iterable

from num2words import num2words

ROUNDS = 4  # of reading, as a rule two: what one writes may be what another looks for


def normalize(text: str) -> str:
    """The words of any text: no digits, single blanks. Never raises, and leaves its own result as it is."""
    for _ in range(ROUNDS):
        before = text
        text = read_once(before)
        if text == before:
            break
    return text


def comparable(text: str) -> str:
    """As `normalize`, to count word errors in: what brackets hold without them, and FBI for F.B.I."""
    text = normalize(text).translate(BRACKETS)
    text = re.sub(r"\b([A-Za-z])\.(?:(?=[A-Za-z]\b)|\s(?=[A-Z]\.))", r"\1", text)
    return re.sub(r"\b([A-Z]{2,9}|[ap]m)\.", r"\1", text)


def read_once(text: str) -> str:
    text = plain_marks(text)
    for pattern, read in READINGS:
        text = pattern.sub(lambda m, read=read: fit(m, read(m)), text)
    return " ".join(text.split())


def fit(m: re.Match, words: str) -> str:
    """Words in place of a match: apart from letters beside it, with a capital if figures began a sentence."""
    if words == m[0]:
        return words
    before = m.string[max(0, m.start() - 8) : m.start()]
    after = m.string[m.end() : m.end() + 1]
    opening = re.search(r"^[\"'(]{0,3}$|(?<!\b[A-Za-z])[.!?][\"')]{0,3} [\"'(]{0,3}$", before)
    if opening and not m[0][0].islower():
        words = words[:1].upper() + words[1:]
    if before[-1:].isalnum() and words[:1].isalnum():
        words = " " + words
    if after.isalnum() and (words or before)[-1:].isalnum():
        words = words + " "
    return words


# Marks

MARKS = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»″", '"'),
        **dict.fromkeys("‘’‚‛‹›′´`ʼ", "'"),
        **dict.fromkeys("‐‑‒−﹣－", "-"),
        **dict.fromkeys("•·¶", " "),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),  # soft hyphen, marks without width
        **dict.fromkeys("—―", " -- "),
        **dict.fromkeys("⁄∕", "/"),
        **{c: c for c in "²³"},
        "…": "...",
        "º": "°",
        "№": "No. ",
        "µ": "μ",
    }
)
BRACKETS = str.maketrans("()[]{}<>", " " * 8)
STANDS_FOR = ("<compat>", "<wide>", "<narrow>", "<noBreak>", "<super>", "<sub>", "<circle>")


def plain_marks(text: str) -> str:
    """Typographic marks as a keyboard's, ligatures as letters, any script's digits as ASCII's, ½ as 1/2."""
    rare = {ord(c): simpler(c) for c in set(text) if not c.isascii() and ord(c) not in MARKS}
    text = unicodedata.normalize("NFC", text.translate(MARKS | rare))
    text = re.sub(r"(?<=\d) ?– ?(?=[\d$£€])", "-", text)
    text = re.sub(r"(?<=\w)–(?=\w)", "-", text)
    return " ".join(text.replace("–", " -- ").split())


def simpler(c: str) -> str:
    """A letter or figure by those that it stands for, as Unicode has it."""
    if unicodedata.category(c) not in ("Ll", "Lu", "Nd", "Nl", "No"):
        return c
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    kind = unicodedata.decomposition(c).split(" ")[0]
    same = unicodedata.normalize("NFKC", c).replace("⁄", "/")
    if kind == "<super>" and same.isdigit():
        return f"^{same}"
    if kind == "<fraction>":
        return f" {same}"
    return same if kind in STANDS_FOR else c


# What is around a match

STARTERS = set(
    """A An The He She It We They I You This That These Those There Here And But Or So Then When
    Where While If In On At As After Before For From To With Without What Who Why How His Her Its My Our
    Their Your No Not Yes Now Once Only Some Many Most All Both Each Every One Two Perhaps However Later
    Soon Today Yesterday Tomorrow Although Because Since Until Let Do Does Did Is Are Was Were Can Could
    Will Would Should Must Please""".split()
)  # words that begin sentences and no names
SMALL_WORDS = set(
    """a an and are as at by from he her his i if in is it my of on or our per she so than
    that the their they this to was we were when where which who with you""".split()
)
PEOPLE = "people men women children feet dollars pounds euros yen persons police sheep".split()
NO_NOUNS = "was has does perhaps always towards begins marks sees".split()


def word_before(m: re.Match) -> str:
    """The word before a match, "" if a mark stands between them."""
    found = re.search(r"([\w'.]{1,30}) ?$", m.string[max(0, m.start() - 32) : m.start()])
    return found[1] if found else ""


def word_after(m: re.Match) -> str:
    """The word after a match, "" if a mark stands between them."""
    found = re.match(r" ([\w']{1,30})", m.string[m.end() : m.end() + 32])
    return found[1] if found else ""


def full_stop(m: re.Match) -> str:
    """ "." where the point of an abbreviation, which is the match, also ends a sentence; else ""."""
    rest = m.string[m.end() : m.end() + 40].lstrip("\"'")
    following = re.match(r"\s[\"'(]{0,2}(\w{1,20})", rest)
    ends = following[1] in STARTERS if following else not rest
    return "." if ends and m[0].endswith(".") else ""


def describes(m: re.Match) -> bool:
    """Whether a quantity belongs to the noun after it: a $20 bill, the 100 m final."""
    after = word_after(m)
    return word_before(m).lower() in ("a", "an", "the") and after[:1].islower() and after not in SMALL_WORDS


def counts(m: re.Match) -> bool:
    """Whether a number tells how many there are of what follows: a noun in the plural."""
    after = word_after(m)
    many = re.fullmatch("[a-z]{2,30}(?<![uis])s", after) is not None
    return after in PEOPLE or many and after not in NO_NOUNS


def is_name(word: str) -> bool:
    return word[:1].isupper() and word not in STARTERS


def capital_as(typed: str, words: str) -> str:
    """`words`, with a capital if what was typed has one."""
    return words[0].upper() + words[1:] if typed[0].isupper() else words


def table(rows: str) -> dict[str, str]:
    """{"km": "kilometer", "ft": "foot"} of "km: kilometer, ft: foot"."""
    return dict(" ".join(row.split()).split(": ") for row in rows.split(","))


# Addresses on the net

ADDRESS = {
    "://": "colon slash slash",
    ":": "colon",
    "/": "slash",
    ".": "dot",
    "@": "at",
    "-": "dash",
    "_": "underscore",
    "?": "question mark",
    "=": "equals",
    "#": "hash",
    "%": "percent",
    "+": "plus",
    "~": "tilde",
    ",": "comma",
    "&": "and",
}


def address(m: re.Match) -> str:
    """https://www.example.com/news, name@example.org; marks at its end are the sentence's."""
    typed = m[0].rstrip("/.,;:!?)]\"'")
    marks = m[0][len(typed) :].lstrip("/")
    spoken = re.sub(either(ADDRESS), lambda mark: f" {ADDRESS[mark[0]]} ", typed)
    spoken = re.sub(r"(?i)\b(?:https?|ftp|www)\b", lambda name: name[0].upper(), spoken)
    return " ".join(spoken.split()) + marks


# Abbreviations

TITLES = table("""Mr: Mister, mr: mister, Mrs: Missus, mrs: missus, Ms: Miz, Drs: Doctors, Messrs: Messers,
    Prof: Professor, Gen: General, Col: Colonel, Capt: Captain, Lt: Lieutenant, Cpl: Corporal, Maj: Major,
    Sgt: Sergeant, Pvt: Private, Adm: Admiral, Cmdr: Commander, Rev: Reverend, Hon: Honorable,
    Gov: Governor, Sen: Senator, Rep: Representative, Pres: President, Supt: Superintendent, Fr: Father,
    Insp: Inspector, Det: Detective, Mt: Mount, Ft: Fort""")
WORDS = table("""etc: et cetera, inc: incorporated, ltd: limited, co: company, corp: corporation,
    bros: brothers, jr: junior, sr: senior, esq: esquire, approx: approximately, dept: department,
    govt: government, assn: association, univ: university, vs: versus, cf: compare, viz: namely,
    misc: miscellaneous, incl: including, excl: excluding, ave: avenue, blvd: boulevard, rd: road,
    hwy: highway, pkwy: parkway, tel: telephone, ext: extension, avg: average""")
POINTLESS = table("""vs: versus, Inc: Incorporated, Ltd: Limited, Corp: Corporation, Jr: Junior,
    Blvd: Boulevard, aka: also known as, WWI: World War one, WW1: World War one, WWII: World War two,
    WW2: World War two, w/o: without, w/: with, and/or: and or, c/o: care of, N/A: not applicable,
    n/a: not applicable, Ph.D.: PhD""")
LATIN = table("eg: for example, ie: that is, aka: also known as, et al: and others")
NUMBERED = table("""no: number, nos: numbers, vol: volume, vols: volumes, ch: chapter, chap: chapter,
    sec: section, fig: figure, figs: figures, eq: equation, p: page, pp: pages, pg: page, art: article,
    sect: section, nr: number, c: circa, ca: circa, pt: part, bk: book, apt: apartment, est: established""")
DAYS = table("""Mon: Monday, Tue: Tuesday, Tues: Tuesday, Wed: Wednesday, Thu: Thursday, Thur: Thursday,
    Thurs: Thursday, Fri: Friday, Sat: Saturday, Sun: Sunday""")
SAINTS = """Agnes Alban Albans Andrew Andrews Anne Anthony Augustine Barbara Bartholomew Benedict Bernard
    Catherine Catharines Charles Clair Clare Clement Cloud Croix David Denis Dominic Edmund Edmunds
    Elizabeth Etienne Francis Gall George Giles Gregory Helena Helens Ignatius Ives James Jerome Joan John
    Johns Joseph Jude Kitts Lawrence Leonards Louis Lucia Lucie Luke Malo Margaret Mark Martin Martins Mary
    Marys Matthew Michael Michaels Moritz Neots Nicholas Olaf Pancras Patrick Patricks Paul Pauls Peter
    Peters Petersburg Sepulchre Simon Stephen Stephens Teresa Thomas Tropez Valentine Valentines
    Vincent""".split()


def title(m: re.Match) -> str:
    """Mr. Brown, Gen Grant."""
    return TITLES[m["title"]]


def saint_or_street(m: re.Match) -> str:
    """St. and Dr.: Saint and Doctor before a name, Street and Drive after one."""
    before = word_before(m)
    after = word_after(m)
    behind = is_name(before) or re.fullmatch(r"\d+(?:st|nd|rd|th)", before)
    ahead = after.split("'")[0] in SAINTS if m["way"] == "St" else is_name(after)
    if behind and not ahead:
        return {"St": "Street", "Dr": "Drive"}[m["way"]] + full_stop(m)
    if is_name(after) or m[0].endswith("."):
        return {"St": "Saint", "Dr": "Doctor"}[m["way"]]
    return m[0]


def abbreviation(m: re.Match) -> str:
    """etc., Inc., Co."""
    return capital_as(m[0], WORDS[m["word"].lower()]) + full_stop(m)


def latin(m: re.Match) -> str:
    """e.g., i.e., et al."""
    return capital_as(m[0], LATIN[m["latin"].lower().replace(". ", "").replace(".", "")])


def pointless(m: re.Match) -> str:
    """What is no word even without a point: vs, Inc, w/, WWII."""
    return POINTLESS[m[0]]


def numbered(m: re.Match) -> str:
    """No. 5, pp. 3-5, c. 1900, Vol. IV."""
    return capital_as(m[0], NUMBERED[m["word"].lower()]) + " "


def day_name(m: re.Match) -> str:
    """Tues.; Sun., May 5."""
    return DAYS[m[0].rstrip(".")]


# Roman numerals

ROMAN = {"C": 100, "XC": 90, "L": 50, "XL": 40, "X": 10, "IX": 9, "V": 5, "IV": 4, "I": 1}
PARTS = """Chapter Chapters Part Parts Book Volume Volumes Act Scene Section Article Title Phase Type Class
    Level Stage Grade Appendix Figure Table Episode Mark Canto Unit Lesson Psalm Bowl War Apollo""".split()
RULERS = """Albert Alexander Alfonso Artaxerxes Benedict Boniface Carl Catherine Charles Christian Clement
    Conrad Darius Edward Elizabeth Ferdinand Francis Frederick George Gregory Gustav Haakon Harald Henri
    Henry Innocent Isabella Ivan James John Joseph Karl Leo Leopold Louis Mary Maximilian Napoleon Nicholas
    Olaf Otto Paul Pedro Peter Philip Pius Ptolemy Ramses Richard Robert Rudolf Sargon Urban Victor Victoria
    Wilhelm William Xerxes""".split()
CROWNED = "King Queen Pope Emperor Empress Tsar Czar Kaiser Prince Sultan".split()


def roman(numeral: str) -> int:
    """The value of a Roman numeral; 0 for what only looks like one."""
    value = 0
    rest = numeral
    for letters, worth in ROMAN.items():
        for _ in range(3 if len(letters) == 1 and letters not in "LV" else 1):
            if rest.startswith(letters):
                value += worth
                rest = rest[len(letters) :]
    return 0 if rest else value


def ruler(m: re.Match) -> str:
    """Henry VIII, Queen Elizabeth I, John D. Rockefeller III."""
    value = roman(m["numeral"])
    surname = " " in m["name"]
    if not value or surname and value > 4 or len(m["numeral"]) == 1 and not is_numeral(m):
        return m[0]
    return f"{m['name']} the {ordinal(str(value))}"


def is_numeral(m: re.Match) -> bool:
    """Whether a single letter after a name is a ruler's number, and neither an initial nor the word I."""
    if word_before(m) in CROWNED:
        return True
    rest = m.string[m.end() : m.end() + 24]
    initial = re.match(r"\. ?([A-Z]\w{0,20})", rest)
    if m["numeral"] not in "IV" or initial and initial[1] not in STARTERS:
        return False
    return m["numeral"] == "V" or not re.match(r" (?!(?:of|was|who|died|reigned|became)\b)|'(?!s)", rest)


def part(m: re.Match) -> str:
    """Chapter IV, Volumes I-III, World War II."""
    first = roman(m["numeral"])
    last = roman(m["last"] or "I")
    if not first or not last or m["numeral"] in "LC" or m["numeral"] == "I" and m["part"][0].islower():
        return m[0]
    words = f"{m['part']} {cardinal(str(first))}"
    return words + m["join"].replace("-", " to ") + cardinal(str(last)) if m["last"] else words


def sequel(m: re.Match) -> str:
    """Rocky II: after a name of which nobody knows whether it is a ruler's."""
    return cardinal(str(roman(m[0]))) if is_name(word_before(m)) else m[0]


# Numbers

IRREGULAR = table("""foot: feet, inch: inches, yen: yen, yuan: yuan, won: won, penny: pence, half: halves,
    six: sixes, horsepower: horsepower""")
PROGRAMS = """version Version release Release Python Ubuntu Debian Fedora Windows Linux Android iOS macOS
    CUDA PyTorch Java JavaScript Node Chrome Firefox kernel Perl Ruby PHP Qt Swift Kotlin GCC Rust
    Bluetooth USB HTTP TLS SSL GPT Llama Claude Gemini""".split()
PLACES = """Boeing Airbus Flight flight Route route Highway highway Interstate Room room Area Suite suite
    Bus bus Channel channel Apartment Model model Studio Gate gate Form""".split()
BEFORE_YEARS = """in since year circa during until before after spring summer autumn fall winter january
    february march april may june july august september october november december""".split()
SCALES = table("""hundred: hundred, thousand: thousand, million: million, billion: billion,
    trillion: trillion, bn: billion, bln: billion, mn: million, mln: million, tn: trillion, K: thousand,
    k: thousand, M: million, m: million, B: billion, b: billion, T: trillion""")


def cardinal(digits: str) -> str:
    """ "1,234": one thousand two hundred thirty-four; what begins with 0, or is long, is spelled."""
    code = len(digits) > 9 and digits.isdigit() and digits[-3:] != "000"
    digits = digits.replace(",", "")
    if code or len(digits) > 15 or len(digits) > 1 and digits[0] == "0":
        return spell(digits)
    return american(num2words(int(digits)))


def ordinal(digits: str) -> str:
    return american(num2words(int(digits.replace(",", "")), to="ordinal"))


def american(words: str) -> str:
    return words.replace(",", "").replace(" and ", " ")


def spell(digits: str) -> str:
    return " ".join(num2words(int(digit)) for digit in digits)


def number(typed: str) -> str:
    """A cardinal or decimal number."""
    whole, point, decimals = typed.partition(".")
    words = cardinal(whole) if whole else "zero"
    return f"{words} point {spell(decimals)}" if point else words


def pairs(digits: str) -> str:
    """Three or four digits as in years and names: nineteen oh five, two thousand seven, seven forty-seven."""
    head = digits[:-2]
    tail = digits[-2:]
    if len(digits) not in (3, 4) or digits[0] == "0" or head[-1] == "0" and tail[0] == "0":
        return cardinal(digits)
    return f"{cardinal(head)} hundred" if tail == "00" else f"{cardinal(head)} {two(tail)}"


def two(digits: str) -> str:
    """Two digits after others: oh five, fifteen."""
    return f"oh {cardinal(digits[1])}" if digits[0] == "0" else cardinal(digits)


def plural(words: str) -> str:
    """Of numbers and units: nineties, feet, miles per hour, degrees Celsius."""
    head, per, rest = words.partition(" per ")
    start, blank, last = head.rpartition(" ")
    if start == "degree":
        return f"degrees {last}"
    if last.endswith("hertz"):
        return words
    many = IRREGULAR.get(last) or (f"{last[:-1]}ies" if last.endswith("ty") else f"{last}s")
    return start + blank + many + per + rest


def amount(typed: str) -> str:
    """A number, a fraction, or a range of numbers."""
    if "/" in typed:
        return fraction(typed)
    low, dash, high = typed.partition("-")
    return f"{number(low)} to {number(high)}" if dash else number(low)


def count(typed: str, unit: str, single: bool = False) -> str:
    """So many of a unit, which is in the plural unless they are one or less, or `single`."""
    single = single or typed == "1" or "/" in typed and " " not in typed
    return f"{amount(typed)} {unit if single else plural(unit)}"


def fraction(typed: str) -> str:
    """1/2, 3/4, 2 1/2, 24/7."""
    whole, _, parts = typed.rpartition(" ")
    over, under = parts.split("/")
    name = PARTS_OF_ONE.get(under)
    if parts in IDIOMS:
        words = f"{cardinal(over)} {cardinal(under)}"
    elif not name:
        words = f"{cardinal(over)} over {cardinal(under)}"
    elif over == "1":
        words = f"a {name}" if whole else f"one {name}"
    else:
        words = f"{cardinal(over)} {plural(name)}"
    return f"{cardinal(whole)} and {words}" if whole else words


IDIOMS = ("24/7", "9/11", "50/50", "20/20")
PARTS_OF_ONE = {str(n): ordinal(str(n)) for n in (*range(3, 11), *range(12, 21), 25, 32, 50, 64, 100, 1000)}
PARTS_OF_ONE |= {"2": "half", "4": "quarter"}


def a_fraction(m: re.Match) -> str:
    return fraction(m["fraction"])


def an_ordinal(m: re.Match) -> str:
    """5th, 1,000th."""
    return ordinal(m["number"])


def decade(m: re.Match) -> str:
    """1990s, the '90s, 747s."""
    return plural(pairs(m["number"]))


def short_year(m: re.Match) -> str:
    """'99, '05."""
    return two(m["number"])


def ranges(m: re.Match) -> str:
    """3-5, 1914-18, 3-2, 50-50, and in a calculation 5 - 3 = 2."""
    low, high = re.split(" ?- ?", m["range"])
    if m["result"] is not None:
        return f"{number(low)} minus {number(high)}"
    if f"{low}/{high}" in IDIOMS:
        return f"{cardinal(low)} {cardinal(high)}"
    if re.fullmatch(r"1\d{3}|20\d\d", low) and re.fullmatch(r"1\d{3}|20\d\d|\d\d", high):
        return f"{pairs(low)} to {two(high) if len(high) == 2 else pairs(high)}"
    return f"{number(low)} to {number(high)}"


def series(m: re.Match) -> str:
    """1-2-3, 4-4-2."""
    return " ".join(map(cardinal, m[0].split("-")))


def thousands(m: re.Match) -> str:
    """1 000 000, 1.000.000."""
    return number(re.sub("[ .]", ",", m[0]))


def version(m: re.Match) -> str:
    """Python 3.11, 1.2.3; an internet address has four parts."""
    parts = m["version"].split(".")
    join = " dot " if len(parts) == 4 else " point "
    rest = [two(part) if len(part) == 2 else pairs(part) for part in parts[1:]]
    words = join.join([pairs(parts[0]), *rest])
    return f"{m['program']} {words}" if m["program"] else words


def release(m: re.Match) -> str:
    """v2, v1.5."""
    return "version " + " point ".join(map(pairs, m["version"].split(".")))


def digit_by_digit(m: re.Match) -> str:
    """Telephone, card and account numbers, their groups apart."""
    groups = re.findall(r"\d+|[A-Za-z]+", m[0])
    words = ", ".join(spell(group) if group.isdigit() else group for group in groups)
    return f"plus {words}" if m[0].startswith("+") else words


def place(m: re.Match) -> str:
    """Room 101, Boeing 737-800."""
    return " ".join([m["place"], *map(pairs, m["number"].split("-"))]).strip()


def in_a_name(m: re.Match) -> str:
    """Digits beside letters: A4, B2B, COVID-19, A380, H100."""
    return number(m["number"]) if "." in m["number"] else pairs(m["number"])


def large(m: re.Match) -> str:
    """5bn, 3.5M, 5M users, but not exit 23B."""
    if m["scale"] in "MB" and "." not in m["amount"] and not counts(m):
        return m[0]
    return f"{number(m['amount'])} {SCALES[m['scale']]}"


def figure(m: re.Match) -> str:
    """A number that stands alone: a year, an airliner, or so many of what follows."""
    digits = m["number"]
    dated = word_before(m).lower() in BEFORE_YEARS
    is_year = re.fullmatch(r"[12]\d{3}", digits) and (dated or digits < "2100" and not counts(m))
    airliner = re.fullmatch(r"7[0-8]7", digits) and not counts(m)
    return pairs(digits) if is_year or airliner else number(digits)


def leftover(m: re.Match) -> str:
    return pairs(m[0])


# Money and measures

CURRENCIES = table("$: dollar, £: pound, €: euro, ¥: yen, ₹: rupee, ₩: won, ₽: ruble, ¢: cent")
HUNDREDTHS = {"$": "cent", "£": "penny", "€": "cent"}
COUNTRIES = table("""US: US, CA: Canadian, C: Canadian, AU: Australian, A: Australian, NZ: New Zealand,
    HK: Hong Kong, S: Singapore""")
CODES = table("""USD: US dollar, GBP: British pound, EUR: euro, JPY: Japanese yen, CAD: Canadian dollar,
    AUD: Australian dollar, CHF: Swiss franc, CNY: Chinese yuan, INR: Indian rupee""")
UNITS = table("""km: kilometer, m: meter, cm: centimeter, mm: millimeter, nm: nanometer, μm: micrometer,
    mi: mile, ft: foot, yd: yard, ha: hectare, kg: kilogram, g: gram, mg: milligram, μg: microgram,
    lb: pound, lbs: pound, oz: ounce, l: liter, L: liter, ml: milliliter, mL: milliliter, cl: centiliter,
    dl: deciliter, dL: deciliter, gal: gallon, tsp: teaspoon, tbsp: tablespoon, pt: pint, qt: quart,
    cc: cubic centimeter, m²: square meter, km²: square kilometer, cm²: square centimeter,
    ft²: square foot, m2: square meter, km2: square kilometer, cm2: square centimeter, m³: cubic meter,
    cm³: cubic centimeter, m3: cubic meter, sq ft: square foot, sq mi: square mile, sq m: square meter,
    sq km: square kilometer, cu ft: cubic foot, mph: mile per hour, kph: kilometer per hour,
    kmh: kilometer per hour, km/h: kilometer per hour, m/s: meter per second,
    m/s²: meter per second squared, mpg: mile per gallon, rpm: revolution per minute,
    fps: frame per second, bpm: beat per minute, hp: horsepower, Hz: hertz, kHz: kilohertz, MHz: megahertz,
    GHz: gigahertz, THz: terahertz, kB: kilobyte, KB: kilobyte, MB: megabyte, GB: gigabyte, TB: terabyte,
    PB: petabyte, KiB: kibibyte, MiB: mebibyte, GiB: gibibyte, TiB: tebibyte, Mb: megabit, Gb: gigabit,
    bps: bit per second, kbps: kilobit per second, Mbps: megabit per second, Gbps: gigabit per second,
    MP: megapixel, px: pixel, dpi: dot per inch, ppm: part per million, W: watt, mW: milliwatt, kW: kilowatt,
    MW: megawatt, GW: gigawatt, Wh: watt hour, kWh: kilowatt hour, MWh: megawatt hour, V: volt,
    mV: millivolt, kV: kilovolt, mA: milliamp, mAh: milliamp hour, Ω: ohm, kΩ: kilohm, dB: decibel,
    Pa: pascal, hPa: hectopascal, kPa: kilopascal, J: joule, kJ: kilojoule, cal: calorie, kcal: kilocalorie,
    eV: electron volt, keV: kiloelectron volt, MeV: megaelectron volt, mol: mole, h: hour, hr: hour,
    hrs: hour, min: minute, mins: minute, s: second, sec: second, secs: second, ms: millisecond,
    μs: microsecond, ns: nanosecond, yr: year, yrs: year, wk: week, wks: week, °C: degree Celsius,
    ° C: degree Celsius, °F: degree Fahrenheit, ° F: degree Fahrenheit, °: degree""")
# With a point, with which "in" is no preposition; and without a number
POINTED = table("""in: inch, ft: foot, yd: yard, mi: mile, lb: pound, lbs: pound, oz: ounce, gal: gallon,
    pt: pint, qt: quart, tsp: teaspoon, tbsp: tablespoon, min: minute, mins: minute, sec: second,
    secs: second, hr: hour, hrs: hour, yr: year, yrs: year, wk: week, sq. ft: square foot""")
ALONE = table("""km/h: kilometers per hour, m/s: meters per second, mph: miles per hour,
    kph: kilometers per hour""")
PER = UNITS | {"d": "day", "mo": "month"}


def money(m: re.Match) -> str:
    """$3.50, US$5, $5-10, $5 million, $3.5bn, $20/month."""
    country = COUNTRIES.get(m["country"], "")
    unit = f"{country} {CURRENCIES[m['symbol']]}".strip()
    typed = m["amount"].replace(m["symbol"], "")
    if m["scale"]:
        words = f"{amount(typed)} {SCALES[m['scale']]} {unit if describes(m) else plural(unit)}"
    elif m["symbol"] in HUNDREDTHS and re.fullmatch(r"[\d,]{0,20}\.\d\d", typed):
        words = with_hundredths(typed, unit, HUNDREDTHS[m["symbol"]])
    else:
        words = count(typed, unit, describes(m))
    return words + per_what(m["per"])


def with_hundredths(typed: str, unit: str, hundredth: str) -> str:
    """Three dollars and fifty cents, fifty cents, five dollars."""
    whole, hundredths = typed.split(".")
    parts = [count(whole, unit)] if whole.strip("0,") or not int(hundredths) else []
    if int(hundredths):
        parts.append(count(str(int(hundredths)), hundredth))
    return " and ".join(parts)


def coins(m: re.Match) -> str:
    """50p, 99¢, 20 USD, 5 €, USD 20."""
    unit = {**CODES, **CURRENCIES, "p": "penny"}[m["code"]]
    return count(m["amount"], unit, describes(m))


def measure(m: re.Match) -> str:
    """5 km, 1/2 mi, 3-5 kg, a 5-km run, 20°C, 70 km/h, 5 mg/dL, 6 ft."""
    unit = POINTED[m["pointed"]] if m["pointed"] else UNITS[m["unit"]]
    single = describes(m) or m["join"] == "-"
    return count(m["amount"], unit, single) + per_what(m["per"]) + full_stop(m)


def per_what(typed: str | None) -> str:
    """ "/kg": per kilogram."""
    unit = typed.strip("/.") if typed else ""
    return f" per {PER.get(unit, unit)}" if unit else ""


def unit_alone(m: re.Match) -> str:
    """km/h without a number."""
    return ALONE[m[0]]


def percent(m: re.Match) -> str:
    return f"{amount(m['amount'])} percent"


def height(m: re.Match) -> str:
    """5'10", 6 ft 2 in."""
    return f"{count(m['feet'], 'foot')} {count(m['inches'], 'inch')}"


def length(m: re.Match) -> str:
    """A 12" record, 8'; not the end of a quotation."""
    if not m["amount"]:
        return m[0]
    return count(m["amount"], {"'": "foot", '"': "inch"}[m["mark"]], describes(m))


# Dates and times

MONTHS = "January February March April May June July August September October November December".split()
SHORT_MONTHS = "Jan Feb Mar Apr Jun Jul Aug Sept Sep Oct Nov Dec".split()


def month_name(typed: str) -> str:
    return next(month for month in MONTHS if month.startswith(typed[:3]))


def date(m: re.Match) -> str:
    """May 5th, 1999; May 5-7; Jan. 5."""
    days = [m["day"], m["last"]] if m["last"] else [m["day"]]
    if not all(1 <= int(day) <= 31 for day in days):
        return m[0]
    end = f", {pairs(m['year'])}" if m["year"] else ""
    return f"{month_name(m['month'])} {' to '.join(map(ordinal, days))}{end}"


def day_first(m: re.Match) -> str:
    """5 May 1999, the 5th of May, 5-7 May."""
    if not 1 <= int(m["day"]) <= 31:
        return m[0]
    the = "" if word_before(m).lower() == "the" else "the "
    start = f"{ordinal(m['from'])} to the " if m["from"] else ""
    end = f", {pairs(m['year'])}" if m["year"] else ""
    return f"{the}{start}{ordinal(m['day'])} of {month_name(m['month'])}{end}" + full_stop(m)


def month_and_year(m: re.Match) -> str:
    """May 1999, Jan. 1999."""
    return f"{month_name(m['month'])} {pairs(m['year'])}"


def month_alone(m: re.Match) -> str:
    """Sept."""
    return month_name(m["month"]) + full_stop(m)


def iso_date(m: re.Match) -> str:
    """1999-05-05."""
    return calendar(m["year"], m["month"], m["day"]) or m[0]


def numeric_date(m: re.Match) -> str:
    """5/12/1999 is May 12th, as an American writes it; 25/12/1999 and 5.12.1999 have the day first."""
    month = m["first"]
    day = m["second"]
    if m["mark"] == "." or int(month) > 12:
        month, day = day, month
    year = m["year"]
    if len(year) == 2:
        year = f"20{year}" if year < "50" else f"19{year}"
    return calendar(year, month, day) or m[0]


def calendar(year: str, month: str, day: str) -> str:
    """A date of numbers; "" if there is none such."""
    try:
        datetime.date(int(year), int(month), int(day))
    except ValueError:
        return ""
    return f"{MONTHS[int(month) - 1]} {ordinal(str(int(day)))}, {pairs(year)}"


def clock(hour: str, minute: str | None, half: str) -> str:
    """A time of day; half: "a.m.", "p.m." or ""."""
    hour = str(int(hour))
    if minute and int(minute):
        return f"{cardinal(hour)} {two(minute)} {half}".strip()
    exact = "o'clock" if 1 <= int(hour) <= 12 else "hundred"
    return f"{cardinal(hour)} {half or exact}"


def half_day(m: re.Match) -> str:
    """3 p.m., 3:30pm, 3-5 pm."""
    if int(m["hour"]) > 24:
        return m[0]
    half = f"{m['half'].lower()}.m."
    end = clock(m["hour"], m["minute"], half)
    if not m["from"]:
        return end
    hour, _, minute = m["from"].replace(".", ":").partition(":")
    start = clock(hour, minute, half).removesuffix(f" {half}")
    return f"{start} to {end}"


def time_of_day(m: re.Match) -> str:
    """15:45, 3:05, 12:30:15, 1:23.45."""
    second = f" {two(m['second'])}" if m["second"] else ""
    decimals = f" point {spell(m['decimals'])}" if m["decimals"] else ""
    return clock(m["hour"], m["minute"], "") + second + decimals


def military(m: re.Match) -> str:
    """0600 hours."""
    minute = two(m["minute"]) if m["minute"] != "00" else "hundred"
    return f"{two(m['hour'])} {minute}"


def ratio(m: re.Match) -> str:
    """3:1."""
    return f"{number(m['first'])} to {number(m['second'])}"


# Symbols

SYMBOLS = table("""&: and, @: at, #: hash, %: percent, +: plus, =: equals, ==: equals, !=: is not,
    <: less than, >: greater than, <=: at most, >=: at least, ->: to, =>: to, →: to, ≤: at most, ≥: at least,
    ≠: is not, ≈: about, ~: tilde, ×: times, ÷: divided by, ±: plus or minus, °: degrees, ^: to the power of,
    /: slash, \\: backslash, ²: squared, ³: cubed, √: square root of, ∞: infinity, §: section,
    ©: copyright""")
SYMBOLS |= {sign: plural(name) for sign, name in CURRENCIES.items()} | dict.fromkeys("*_|®", "")


def symbols(m: re.Match) -> str:
    """What signs are called, one or some in a row."""
    names = [SYMBOLS[sign] for sign in re.findall(either(SYMBOLS), m[0])]
    return " ".join(name for name in names if name)


def inside(m: re.Match) -> str:
    """*Emphasis* without its marks."""
    return m["inside"]


def named(name: str) -> Callable[[re.Match], str]:
    """A reading that is always the same."""
    return lambda m: name


# How it is read


def either(keys: Iterable[str]) -> str:
    """A pattern for one of some strings, the longest that fits."""
    return "|".join(re.escape(key) for key in sorted(keys, key=len, reverse=True))


def either_case(keys: Iterable[str]) -> str:
    capitals = [key.capitalize() for key in keys]
    return either([*keys, *capitals])


def compiled(pattern: str) -> re.Pattern:
    """A pattern in which <NAMES> are those of FRAGMENTS."""
    while re.search("<[A-Z]+>", pattern):
        pattern = re.sub("<([A-Z]+)>", lambda name: FRAGMENTS[name[1]], pattern)
    return re.compile(pattern)


FRAGMENTS = {
    "START": r"(?<![\w.])(?<!\d[,:/])",  # not within a number or a word
    "END": r"(?!\d|[.,:/]\d)",
    "WHOLE": r"(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})",
    "NUMBER": r"(?:<WHOLE>(?:\.\d{1,15})?|\.\d{1,15})",
    "AMOUNT": r"<START>(?P<amount>(?:\d{1,9} )?\d{1,4}/\d{1,4}<END>|<NUMBER>(?:-<NUMBER>)?<END>)",
    "YEAR": r"(?:1\d|20)\d\d",
    "YEARS": r"(?P<year>\d{4}|(?<=/)\d\d)",
    "OFYEAR": r"(?:,? (?P<year><YEAR>|\d{4}(?= (?:AD|BC))))?",
    "MONTH": rf"(?P<month>{either(MONTHS)}|(?:{either(SHORT_MONTHS)})\b\.?)",
    "DAY": r"(?P<day>\d{1,2})(?:st|nd|rd|th)?",
    "MARK": "(?P<mark>[/.-])",
    "DAYS": either(DAYS),
    "ANYMONTH": either([*SHORT_MONTHS, "May"]),
    "FROM": r"(?:(?P<from>\d{1,2}(?:[:.][0-5]\d)?) ?- ?)?",
    "CLOCK": r"(?P<hour>\d{1,2})(?:[:.](?P<minute>[0-5]\d))?",
    "PROGRAM": either(PROGRAMS),
    "RULER": either(RULERS),
    "PART": either(PARTS),
    "SECOND": r"(?::(?P<second>[0-5]\d))?(?:\.(?P<decimals>\d{1,3}))?",
    "JOIN": "(?P<join> and | to | of |-|, )",
    "NUMERAL": r"(?P<numeral>[IVXLC]{1,8})\b",
    "SCALE": r"(?: ?(?P<scale>hundred|thousand|million|billion|trillion|<SHORT>|(?<=\d)[KkMmBbT])\b)?",
    "SHORT": "bn|bln|mn|mln|tn",
    "PER": rf"(?P<per>/(?:{either(PER)}|[a-z]{{3,12}})(?!\w)(?:\.(?= [a-z]))?)?",
    "UNIT": rf"(?:(?P<pointed>{either(POINTED)})\.|(?P<unit>{either(UNITS)})<PER>)(?![\w²³])",
    "MONEY": r"<COUNTRY>(?P<symbol>[$£€¥₹₩₽]) ?(?P<amount><NUMBER>(?:-[$£€¥]?<NUMBER>)?)<END>",
    "COUNTRY": rf"(?:\b(?P<country>{either(COUNTRIES)}))?",
    "CODE": rf"(?P<code>{either([*CODES, *CURRENCIES])})",
    "TOP": "com|org|net|edu|gov|io|ai|dev|app|info|tv|co|uk|de|fr|eu|ca|au|ch|jp",
}
PHONES = [
    r"\+\d{1,3}(?:[ .-]\(?\d{2,5}\)?){2,5}",
    r"\+\d{7,15}",
    r"(?:1[ .-])?\(\d{3}\) ?\d{3}[ .-]\d{4}",
    r"(?:1[.-])?\d{3}[.-]\d{3}[.-]\d{4}",
    r"\d{3} \d{3} \d{4}",
    r"\d{3}-\d{4}",
    r"(?:1-)?8\d\d-[A-Z]{4,8}",
    r"0\d{2,4} \d{3,4} \d{3,4}",
    r"0\d{3,4} \d{6}",
    r"\d{3}-\d\d-\d{4}",
    r"\d{4}(?: \d{4}){3}",  # social security, credit cards
    r"\d{5}-\d{4}",
    r"(?<=[A-Z]{2} )\d{5}",  # ZIP codes
    r"(?<=[Cc]all )\d{3}",
    r"(?<=[Dd]ial )\d{3}",
    r"(?<=[Aa]rea code )\d{3}",
]
PATTERNS = [
    (r"(?i)\b(?:(?:https?|ftp)://|www\.)\S+", address),
    (r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}", address),
    (r"(?<![\w@.-])(?:[A-Za-z0-9][\w-]{0,62}\.){1,5}(?:<TOP>)\b(?:/\S*)?", address),
    (r"(?<=[A-Za-z]{2})\.(?=[a-z]{2})|(?<!\S)\.(?=[A-Za-z]{2})", named(" dot ")),
    (r"(?<![\w*])\*{1,3}(?P<inside>[^\s*][^*]{0,300})\*{1,3}(?![\w*])", inside),
    (r"(?<!\w)_{1,3}(?P<inside>[^\s_][^_]{0,300})_{1,3}(?!\w)", inside),
    (r"\b(?P<latin>[Ee]\.(?:g\.?| g\.)|[Ii]\.(?:e\.?| e\.)|eg\.|ie\.|a\.k\.a\.|et al\.)(?!\w)", latin),
    (rf"(?<!\d )\b(?P<word>{either_case(NUMBERED)})(?:\.|(?<=pp)) ?(?=\d)", numbered),
    (r"\b(?P<word>[Vv]ol|[Cc]h|[Cc]hap|[Ss]ec|[Ff]ig|[Pp]t|[Bb]k|[Aa]rt)\. ?(?=[IVXLC]{1,8}\b)", numbered),
    (rf"\b(?P<title>{either(TITLES)})(?:\.|(?= [A-Z][a-z.]))", title),
    (r"\b(?P<way>St|Dr)(?:\.|(?!\w))", saint_or_street),
    (rf"\b(?P<word>{either_case(WORDS)})\.(?!\w)", abbreviation),
    (r"\b(?:<DAYS>)(?:\.|(?=,))(?=,? (?:\d{1,2} )?(?:<ANYMONTH>))|\b(?!Sun)(?:<DAYS>)\.", day_name),
    (rf"(?<![\w/])(?:(?:{either(POINTLESS)})(?![\w/])|w/(?=\w))", pointless),
    (r"(?<=[a-z]) v\. (?=[A-Z])", named(" versus ")),
    (r"\b(?P<name>(?:<RULER>)(?: [A-HJ-Z]\.| [A-Z][a-z]{1,20}){0,2}) <NUMERAL>(?:\.(?=,))?", ruler),
    (r"\b(?P<part>(?i:<PART>)) <NUMERAL>(?:<JOIN>(?P<last>[IVXLC]{2,8}|[VX])\b)?", part),
    (r"(?<=[A-Za-z] )(?:III?|IV|VI{1,3}|IX|XI{1,3}|XIV|XVI{0,3})\b", sequel),
    (r"#(?=\d)", named("number ")),
    (r"(?<=\d)\*(?![\w*])", named(" star")),
    (r"(?<![\w)\]'\".-])-(?=[$£€¥]?\.?\d)", named("minus ")),
    (r"(?<=[$£€¥])-(?=\d)", named("")),
    (r"<START>(?P<year>\d{4})<MARK>(?P<month>\d\d)(?P=mark)(?P<day>\d\d)(?!\d)(?:T(?=\d))?", iso_date),
    (r"<START>(?P<first>\d{1,2})<MARK>(?P<second>\d{1,2})(?P=mark)<YEARS><END>(?!\w)", numeric_date),
    (r"\b<MONTH> <DAY>(?: ?- ?(?P<last>\d{1,2})(?:st|nd|rd|th)?)?<OFYEAR>(?![\w%]|[.,:/]\d)", date),
    (r"<START>(?:(?P<from>\d{1,2}) ?- ?)?<DAY> (?:of )?<MONTH><OFYEAR>(?!\w)", day_first),
    (r"\b<MONTH>,? (?P<year><YEAR>)(?!\w|[.,:/]\d)", month_and_year),
    (r"\b(?P<month>Feb|Aug|Sept?|Oct|Nov|Dec)\.", month_alone),
    (r"(?:(?<=[AaPp][Mm])|(?<=[AaPp]\.[Mm]\.)|(?<=\d:\d\d)) ?- ?(?=\d)", named(" to ")),
    (r"<START><FROM><CLOCK> ?(?P<half>[AaPp])(?:\.? ?[Mm]\.|[Mm]\b)", half_day),
    (r"<START>(?P<hour>[01]?\d|2[0-4]):(?P<minute>[0-5]\d)<SECOND>(?![\w:])", time_of_day),
    (r"<START>(?P<hour>[01]\d|2[0-4])(?P<minute>[0-5]\d)(?= (?:hours|GMT|UTC)\b)", military),
    (r"<START>(?P<first>\d{1,4}):(?P<second>\d{1,4})(?![\w:])", ratio),
    (rf"(?<![\w.])(?:{'|'.join(PHONES)})(?![\w-])", digit_by_digit),
    (r"<START>\d{1,3}(?: 000){1,4}(?!\w)|<START>\d{1,3}\.\d{3}\.\d{3}(?![.\d])", thousands),
    (r"\bv\.? ?(?P<version>\d{1,4}(?:\.\d{1,4}){0,4})(?![\w.])", release),
    (r"\b(?P<program><PROGRAM>)[ -]?(?P<version>\d{1,4}(?:\.\d{1,4}){1,4})(?!\.?\d)", version),
    (r"<START>(?P<program>)(?P<version>\d{1,4}(?:\.\d{1,4}){2,4})(?!\.?\d)", version),
    (r"(?<=\d) ?x ?(?=10\^)", named(" times ")),
    (r"(?:(?<=\d)|(?<=\d['\"])) ?x ?(?=\d)", named(" by ")),
    (r"(?<=\d) / (?=\d)", named(" divided by ")),
    (r"(?<=\d)[Ee]-(?=\d)", named(" e minus ")),
    (r"<START>(?P<feet>\d{1,2})' ?(?P<inches>\d{1,2})(?:\"|'')?(?!\w)", height),
    (r"<START>(?P<feet>\d{1,2}) ?(?:ft|feet|foot)\.? (?P<inches>\d{1,2}) ?in\b\.?", height),
    (r"\"[^\"]{0,300}\"|(?<!\w)'[^']{0,300}'(?!\w)|<START>(?P<amount><NUMBER>)(?P<mark>[\"'])(?!\w)", length),
    (r"<MONEY><SCALE><PER>", money),
    (r"<START>(?P<amount>\d{1,2})(?P<code>p)(?!\w)", coins),
    (r"<AMOUNT> ?<CODE>(?!\w)", coins),
    (r"\b<CODE> ?<AMOUNT>", coins),
    (r"<AMOUNT> ?%", percent),
    (r"(?<![\w.])'?(?P<number>(?:1\d|20)?\d0)'?s\b", decade),
    (r"<START>(?P<number>\d{1,4})s\b", decade),
    (r"<AMOUNT>(?P<join>[ -]?)<UNIT>", measure),
    (rf"(?<![\w/])(?:{either(ALONE)})(?![\w/])", unit_alone),
    (r"(?<=\d)[x×](?!\w)", named("times")),
    (r"<START>(?P<amount><NUMBER>)(?P<scale><SHORT>|M|B)(?!\w)", large),
    (r"<START>(?P<fraction>(?:\d{1,9} )?\d{1,4}/\d{1,4})(?![\w/])", a_fraction),
    (r"<START>(?P<place>)(?P<number>7[0-8]7-\d{3})(?!\w)", place),
    (rf"\b(?P<place>{either(PLACES)}) (?P<number>\d{{3,4}}(?:-\d{{3,4}})?)(?!\w|[.,]\d)", place),
    (r"<START>\d{1,3}(?:-\d{1,3}){2,8}(?![\w-])", series),
    (r"<START>(?P<range><NUMBER> ?- ?<NUMBER>)<END>(?P<result>(?= ?=))?", ranges),
    (r"<START>(?P<number><WHOLE>)(?:st|nd|rd|th|ST|ND|RD|TH)\b", an_ordinal),
    (r"(?<![\w'])'(?P<number>\d\d)(?![\w'])", short_year),
    (r"(?<=[A-Za-z])-?(?P<number>\d{1,15}(?:\.\d{1,15})?)(?!\d)", in_a_name),
    (r"(?<![\d.,])(?P<number>\d{1,15}(?:\.\d{1,15})?)(?=[A-Za-z])", in_a_name),
    (r"<START>(?P<number><NUMBER>)<END>", figure),
    (r"(?<=\d),(?=\d{1,2}(?!\d))", named(", ")),
    (r"<START>(?P<number><NUMBER>)<END>", figure),
    (r"\d+", leftover),
    (r"(?<=[a-z])/(?=(?:second|minute|hour|day|night|week|month|year|person)\b)", named(" per ")),
    (r"(?<=\b[A-G])#(?!\w)", named("sharp")),
    (r"#(?=[A-Za-z])", named("hashtag ")),
    (r"~(?=[A-Za-z])", named("about ")),
    (r"(?<=\w)\*\*(?=\w)", named(" to the power of ")),
    (r"(?<=\w)(?:\*| \* )(?=\w)", named(" times ")),
    (rf"(?:{either(SYMBOLS)}){{1,30}}", symbols),
]
READINGS = [(compiled(pattern), read) for pattern, read in PATTERNS]
