# ruff: noqa: RUF001
"""One spelling for the many ways to write an answer, and what needs no arithmetic: option letters, Yes and No."""

import functools
import re
import unicodedata


# -------- characters and LaTeX

_SIGNS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "√": "sqrt", "±": "pm", "∞": "infty", "≤": "le",
    "≥": "ge", "⩽": "le", "⩾": "ge", "≠": "ne", "≈": "approx", "≅": "cong", "∼": "sim", "∠": "angle", "△": "triangle",
    "∪": "cup", "∩": "cap", "∅": "emptyset", "∈": "in", "ℝ": "mathbb{R}", "∥": "parallel", "⊥": "perp", "→": "to",
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "θ": "theta", "λ": "lambda", "μ": "mu", "π": "pi",
    "ρ": "rho", "σ": "sigma", "φ": "phi", "ω": "omega", "τ": "tau", "ε": "epsilon", "η": "eta", "κ": "kappa",
    "ν": "nu", "ξ": "xi", "χ": "chi", "ψ": "psi", "ζ": "zeta", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "ℏ": "hbar",
    "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
}  # fmt: skip
_CHARS = {sign: f"\\{name} " for sign, name in _SIGNS.items()}
_CHARS |= dict.fromkeys("\u2212\u2013\u2014\u2012\u2010\ufe63", "-")
_CHARS |= {
    "\u00ba": "°",
    "µ": "u",
    "\u2126": "Ω",
    "、": ",",
    "㎡": "m^2",
    "∶": ":",
    "‰": " permille",
    "″": "''",
    "′": "'",
}
_CHARS |= {"【": "[", "】": "]", "〔": "[", "〕": "]", "\u2044": "/"}
_CHARS |= {c: f" {unicodedata.normalize('NFKC', c).replace(chr(0x2044), '/')}" for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_CHARS |= {"∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_CHARS |= dict.fromkeys("“”„", '"') | dict.fromkeys("‘’", "'")
_CHARS |= {"⟨": r"\langle ", "⟩": r"\rangle ", "∽": r"\sim ", "〈": r"\langle ", "〉": r"\rangle "}
_CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩"
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBST = [
    (r"(?<=\d) ?[μµ](?=[mgsLlAFVCNJ])", " u"),
    (r"^\s*([A-J])、(?=\s*\d)", r"\1. "),
    (r"(?<=[\d)}])\s*或者?\s*(?=[-\d(\\])", " or "),
    (r"(?<=[\d)}])\s*[和与及]\s*(?=[-\d(\\])", " and "),
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: f"^{{{m[0].translate(_SUPER)}}}"),
    (r"[₀-₉]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}"),
]
_SUBST = [(re.compile(pattern), new) for pattern, new in _SUBST]
_LATEX = [
    (r",\s*\\!\s*", ","),
    (r"(?<!\\)\\[()\[\]]", " "),
    (r"`([^`]+)`", r"\1"),
    (r"(?<![\w)}])\*\*([^*]+)\*\*(?![\w({])", r"\1"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\\(?:text|mathrm)\s*\{\s*([A-Z][a-z]?)\s*\}(?=\s*_)", r"\1"),
    (r"(_\{?\d+\}?)\s*\\(?:text|mathrm)\s*\{\s*([A-Z][a-z]?)\s*\}", r"\1\2"),
    (r"\\(?:left|right|displaystyle|limits|rm|bf|it|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|(?<!~)~(?!~)|(?<!\\)\{\}", " "),
    (
        r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname|boldsymbol)\s*"
        r"\{((?:[^{}]|\{[^{}]*\})*)\}",
        r" \1 ",
    ),
    (r"\{,\}", ","),
    (r"\\(begin|end) ?\{[bB]matrix\}", r"\\\1{pmatrix}"),
    (r"[(\[]\s*(\\begin\{)(matrix\}.*?\\end\{)(matrix\})\s*[)\]]", r"\1p\2p\3"),
    (r"\\([%$#&])", r"\1"),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])|\^\s*°", "\u00b0"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=|=<", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\neq(?![A-Za-z])|!=|\\not\s*=|=/=", r"\\ne "),
    (r"\\(?:long)?rightarrow(?![A-Za-z])|->|-->", r"\\to "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
    (r"\\(?:colon)(?![A-Za-z])", ":"),
    (r"\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|"),
    (r"\\[lr]brack(?![A-Za-z])", lambda m: "[" if m[0][1] == "l" else "]"),
    (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
    (r"\\Omega(?![A-Za-z])", "\u03a9"),
    (r"\\cdotp(?![A-Za-z])|\\bullet(?![A-Za-z])|\\ast(?![A-Za-z])", r"\\cdot "),
    (r"\\(?:dots|ldots|cdots)(?![A-Za-z])", "..."),
    (r"(?<![A-Za-z\\])(sqrt|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])(?:inf|infinity|oo)(?![A-Za-z\d])", r"\\infty "),
    (r"\\Delta(?= ?[A-Z]{3}(?![A-Za-z]))", r"\\triangle"),
    (r"^(?:\\?\{ ?)?([a-z])(?: ?\\in ?\\mathbb\{R\})? ?[|:] ?(?=\1\b)(.*?)(?:\\?\})?$", r"\2"),
    (r"(?<![A-Za-z\\])([Aa]ngle|[Tt]riangle)(?= ?[A-Z]{1,3}\b)", lambda m: f"\\{m[1].lower()} "),
    (r"(?<=[A-Z]) ?// ?(?=[A-Z])", r"\\parallel "),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"(?<=\d) ?\\mu ?(?=[mgsLlAFVCNJ](?![A-Za-z]))", " u"),
    (r"(?<=\d) out of (?=\d)", "/"),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    *[(r"(\\sqrt|\^)\s*\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}")] * 3,
    (r"\\sqrt\s*(\[\d+\])?\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))", r"\\sqrt\1{\2}"),
    (r"\\frac\s*(\d)\s*(?=[\d{A-Za-z])", r"\\frac{\1}"),
    (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*(\d|[A-Za-z](?![A-Za-z]))", r"\1{\2}"),
    (r"\^\s*([+-]?\d+)", r"^{\1}"),
    (r"\^\s*([A-Za-z])", r"^{\1}"),
    (r"_\s*(\w)", r"_{\1}"),
    (r"(?<=\d) ?([AaPp])\.? ?[Mm]\.?(?![A-Za-z])", lambda m: f" {m[1].upper()}M"),
]
_LATEX = [(re.compile(pattern), new) for pattern, new in _LATEX]
# Most answers are plain: what none of these is in, no rule above can change.
_DRESSED = re.compile(
    r"[\\`*~^_{!<>=°-]|sqrt|arc|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|inf|oo|ngle|//|out of|\d ?[AaPp]\.? ?[Mm]"
)

# -------- what stands around an answer

_LEAD_IN = re.compile(
    r"(?:so|thus|therefore|hence|then)\b[,:\s]*|∴\s*|\\therefore\s*"
    r"|(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|result|choice|selection)\s*(?:\b(?:is|are|should be)\b\s*:?|[:=])\s*"
    r"|(?:所以|因此|故)?[,\s]*(?:最终|最后|正确)?的?(?:答案|结果)\s*(?:(?:是|为|:)\s*:?\s*|(?=选))|(?:所以|因此|故)[,\s]*"
    r"|\\approx\s*|(?:approximately|approx\.|about|roughly|around|exactly)\s+(?=[\d$\\-])|约(?:为|是)?\s*(?=\d)|=\s*"
    r"|(?:in )?(?:the year )?(?=\d{4}$)|(?:一?共有?|总共|等于|大约)(?=\d)",
    re.I,
)
_PAIRS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ('"', '"'), ("'", "'"), ("[[", "]]")]


def strip_prefix(text: str) -> str:
    """`text` without the literal prefix `Final Answer:` of the released samples `[repo]`."""
    return re.sub(r"^\s*final\s+answer\s*[:\uff1a]", "", text.strip(), count=1, flags=re.I).strip()


def closing(text: str) -> int:
    """Index of the bracket that closes the one at 0; -1 when there is none."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth <= 0:
            return i if i else -1
    return -1


def without_brackets(text: str) -> str:
    """`text` without brackets that only group it: `((7))`, `{x+1}`."""
    opening = len(text) - len(text.lstrip("({ "))
    for _ in range(min(opening, 60)):
        if (
            text[:1] + text[-1:] not in ("()", "{}")
            or len(text) < 3
            or re.search("[,;]", text)
            or closing(text) != len(text) - 1
        ):
            break
        text = text[1:-1].strip()
    return text


_END_OF_TURN = re.compile(r"\s*<\|[a-z_]{1,20}\|>$")
_EMPHASISED_LABEL = re.compile(r"^(\*{1,2}|_{1,2})([^*_\n]{1,30}:)\1\s*")
_FINAL_STOP = re.compile(r"[^.]\.$|[^\\][,;]$|(?:^|\s)[A-Za-z]{2,}!$|！$")
_BEFORE_BOX = re.compile(
    r"\W*(?:(?!.*\b(?:not|no|or|never)\b)(?:[A-Za-z][A-Za-z ,']*(?:\b(?:is|are|be|answer|equals|get|have)\b|[:=])"
    r"|so|thus|hence|therefore)\W*|(?:最终|正确)?答案\W*[是为]?\W*)?",
    re.I,
)


def _unwrap(text: str) -> str:
    text = _END_OF_TURN.sub("", text.strip()).removesuffix("。").rstrip()
    text = _EMPHASISED_LABEL.sub(r"\2 ", text)
    if _FINAL_STOP.search(text):
        text = text[:-1].rstrip()
    for left, right in _PAIRS:
        if text.startswith(left) and text.endswith(right):
            inside = text[len(left) : len(text) - len(right)]
            if inside and left not in inside:
                text = inside
    for mark in ("**", "__", "*"):
        if text.startswith(mark) and text.count(mark) % 2 == 0 and len(text) > 2 * len(mark):
            text = text.replace(mark, "")
    if text.startswith("#"):
        text = text.lstrip("# ")
    if "boxed" in text or "fbox" in text:
        text = _unbox(text.replace(r"\fbox", r"\boxed"))
    if lead := _LEAD_IN.match(text):
        text = text[lead.end() :] or text
    return without_brackets(text.strip())


def _unbox(text: str) -> str:
    """What is in the only box of `text`, if it ends with that and nothing else before it can be an answer."""
    before, _, box = text.partition(r"\boxed")
    box = box.lstrip()
    if not box or r"\boxed" in box or not _BEFORE_BOX.fullmatch(before):
        return text
    if box[0] == "{" and closing(box) == len(box) - 1:
        return box[1:-1]
    return box if box[0].isalnum() and not re.search(r"\s", box) else text


@functools.lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """One spelling for the ways to write the same thing: unicode, LaTeX dressing, wrappers, lead-ins."""
    if not text.isascii():
        for pattern, new in _SUBST:
            text = pattern.sub(new, text)
        text = "".join(_CHARS.get(c, c if c in _CIRCLED else unicodedata.normalize("NFKC", c)) for c in text)
    for _ in range(8):
        before, text = text, _unwrap(text)
        if text == before:
            break
    if text.count("$") > 1 and text.count("$") % 2 == 0:
        text = text.replace("$", " ")
    if _DRESSED.search(text):
        for pattern, new in _LATEX:
            text = pattern.sub(new, text)
    if "&" in text and r"\begin" not in text:
        text = text.replace("&", " and ")
    return re.sub(r"\s+", " ", _unwrap(text))


# A molecule or an ion: subscripts and charges may be written in any way, but `CO` is not `Co`.
FORMULA = re.compile(r"(?=.*[\d+-])(?:[A-Z][a-z]? ?(?:_?\{?\d+\}?)?|\(|\))+ ?(?:\^?\{?\d*\}?[+-]\}?)?")

_AMONG_CIRCLED = re.compile(rf"(?<=[{_CIRCLED}])[ ,]+(?=[{_CIRCLED}])")
_DIGIT, _LONG_WORD = re.compile(r"\d"), re.compile(r"[^\W\d_]{4}")
_TWO_NUMBERS = re.compile(r"(?<=\d), (?=\d{3}(?!\d))")  # not a thousand
_SPACE_AT_SIGN = re.compile(r" (?=[\W\u4e00-\u9fff])|(?<=[\W\u4e00-\u9fff]) ")
_SUBSCRIPT = re.compile(r"(\\[A-Za-z]+)?(?<=[A-Za-z])_\{?(\d+)\}?")


@functools.lru_cache(maxsize=4096)
def fold(text: str) -> str:
    """What two cleaned texts must share to be equal: neither spaces beside signs, nor case outside mathematics."""
    if FORMULA.fullmatch(text):
        return re.sub(r"[_^{} ]", "", text)
    text = _AMONG_CIRCLED.sub("", text)
    if "\\" not in text and (_LONG_WORD.search(text) or not _DIGIT.search(text)):
        text = text.casefold()
    if text[:1] not in "([{":
        text = _TWO_NUMBERS.sub(";", text)
    text = _SPACE_AT_SIGN.sub("", text)
    return _SUBSCRIPT.sub(lambda m: m[0] if m[1] else m[2], text) if "_" in text else text


# -------- letters, Yes and No

OPTION = re.compile(
    r"(?:(?:i (?:choose|pick|select)|the|it is|it's|you should choose|choose|select) )?"
    r"(?:(?:correct|right|best) )?(?:(?:option|choice|answer|选择?项?)(?: is| selected)?:? ?)?[(\[]?(?P<letter>[A-J])"
    r"(?P<sep>[)\]][.:]?|[.:]|,(?!\d)| ?$|(?= is (?:the )?(?:correct|right|best|answer)| because| since)"
    r"| - | (?=[\d$(]))(?P<rest>.*)",
    re.I | re.S,
)
# Another letter in what stands behind the first one: any that stands alone, unless a word names it (`Point A`) or it
# is an article. Words that join or hedge name nothing.
_OTHER = re.compile(
    r"(?:(?<![\\A-Za-z'])(\\(?:angle|triangle)|[A-Za-z]{2,}) +|([\u4e00-\u9fff]))?"
    r"[^\w\s]*(?<![A-Za-z\d_])([A-HJ])(?![\w'])([.):] )?"
)
_JOINS = re.compile(
    r"or|and|not|nor|but|also|then|maybe|perhaps|possibly|probably|actually|wait|because|since|is|be|option|choice|"
    r"answer|choose|select|versus|vs|to|either"
)
_JOINS_IN_CHINESE = "或和及与选有是为"
_REFUSED = re.compile(
    r"^\W*(?:or|nor|but|and)\b|\b(?:is|are|was|be) (?:not|wrong|incorrect|false)\b|\bnot (?:right|correct|it)\b"
    r"|\bcan(?:not|'t) be (?:right|correct)\b|n't\b|\((?:wrong|incorrect|false|not)\b",
    re.I,
)
_LETTERS = re.compile(
    r"[(\[]?[A-J][)\].]{0,2}(?:(?: ?[,;/] ?| ?, ?and |(?: and)? )[(\[]?[A-J][)\].]{0,2})+|[A-J]{2,6}"
)


# `B. 65 is not the answer`, but not `B. The lines are not parallel`
_ABOUT_THE_LETTER = re.compile(
    r"\bnot (?:the )?(?:answer|right|correct|it\b)|\b(?:which|that|this|it) is (?:wrong|incorrect|false)"
    r"|^\W*(?:is |can(?:not|'t) be (?:right|correct))|\((?:wrong|incorrect|false|not)\b",
    re.I,
)


def letter_of(text: str) -> str | None:
    """The one option letter that `text` names; `None` for several, for a negated one and for none."""
    match = OPTION.fullmatch(text)
    if not match:
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    if match["letter"] == "i" and not rest:
        return None
    if match["letter"].islower() and (match["sep"] not in (")", ").", "]", ".", "") or (rest and not match["sep"])):
        return None
    refused = _REFUSED.search(rest)
    if refused and (not match["sep"] or refused.start() == 0 or _ABOUT_THE_LETTER.search(rest)):
        return None
    others = set()
    for word, sign, other, labels in _OTHER.findall(rest.upper() if match["letter"].islower() else rest):
        article = other == "A" and re.match(r"\W*[Aa] [a-z]{2}", rest)
        if (
            not article
            and (not word or labels or _JOINS.fullmatch(word.lower()))
            and (not sign or sign in _JOINS_IN_CHINESE)
        ):
            others.add(other)
    if match["sep"] == ",":
        others.update(re.findall(r"\b[A-J]\b", rest))
    return letter if others <= {letter} else None


def letters_of(text: str) -> frozenset[str] | None:
    """The letters of an answer that names several (`A, C`, `A and C`, `AC`), where order doesn't matter."""
    if not _LETTERS.fullmatch(text):
        return None
    letters = re.findall("[A-J]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else None


_DENIAL = re.compile(r"\W*(?:(?:it|they|this|that) )?(?:(?:is|are|does|do|was|were)(?: not|n't)|not)\W*", re.I)


def yes_or_no(text: str) -> tuple[str, frozenset[str]] | None:
    """`yes`, `no`, `true` or `false`, and the words of a reason, when `text` says just that."""
    match = re.match(
        r"(yes|no|true|false)(?:(?: ?[.,;:!-] ?| (?=it|they|the|this|that|because))(.*))?$", text, re.I | re.S
    )
    reason = match[2] or "" if match else ""
    if not match or re.search(r"\b(yes|no|true|false|or|maybe|wrong|incorrect)\b", reason, re.I):
        return None
    if match[1].lower() in ("yes", "true") and _DENIAL.fullmatch(reason):
        return None
    return match[1].lower(), frozenset(re.findall(r"\w+", reason.lower()))
