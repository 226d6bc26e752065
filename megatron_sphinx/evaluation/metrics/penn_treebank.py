"""Words of captions as the Penn Treebank parts them: a lexer by rules of which the longest match wins, else the first.

CIDEr is defined on the words that Stanford's PTBTokenizer 3.4.1 makes, in lower case, without punctuation. The rules
here are written anew after its description and its output, and agree with it on captions and on nearly all of what else
one can write. Known to differ: rare separators of lines such as U+2028 do not move captions to other pictures; marks of
scripts that are rare in captions may be parted in other places.

Source: Stanford CoreNLP's PTBLexer; ptbtokenizer.py of pycocoevalcap, which has the punctuation that is left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The names of brackets are in capitals there, and words in lower case by then: brackets stay.
LEFT_OUT = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_SPACE = "[ \t\u00a0\u2000-\u200a\u3000]"
# what Python calls alphanumeric and is no letter there
_NO_LETTERS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u2189\u2460-\u24ff\U00010000-\U0010ffff"
_LETTER = f"(?:[^\\W\\d_{_NO_LETTERS}]|\u00ad|&[aeiou](?:acute|grave|uml);)"
_MARKS = (
    "[\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065e\u0900-\u0903\u093c"
    "\u093e-\u094d\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]"
)
_WORD = f"(?:{_LETTER}|{_MARKS})+"
_PLAIN = f"[^\\W_{_NO_LETTERS}]"  # a letter or digit
_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_ANY_APOSTROPHE = f"(?:{_APOSTROPHE}|[`\u0091\u2018\u201b])"
_CLITIC = f"{_APOSTROPHE}(?:re|ve|ll|[msd])"
_NOT = f"n{_ANY_APOSTROPHE}t"
_NUMBER = "(?:\\d*(?:[.:,\u00ad\u066b\u066c]\\d+)+|\\d+)"
_ROMAN = "(?-i:[A-Za-z])"  # in a class of its own Python would find other letters that are like these but for case
_ACRONYM = f"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\\.S|U\\.S\\.-(?:U\\.S\\.S\\.R|U\\.K)|{_ROMAN}(?:\\.{_ROMAN})+)"
# Shortened words keep their period. Where a sentence ends behind one there is a second, which is left out like any.
_SHORTENED = (
    "(?:(?:Ed|Ph)\\.D|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri|Ala|Ariz|(?-i:A)z"
    "|(?-i:A)rk|Calif|Colo|Conn|Ct|Dak|(?-i:D)el|Fla|Ga|(?-i:I)ll|Ind|Kans?|Ky|(?-i:La)|(?-i:M)ass|Md|Mich|Minn|(?-i:M)iss"
    "|Mo|Mont|Neb|Nev|Okla|(?-i:O)re|(?-i:P)a|Penn|Tenn|(?-i:T)ex|Va|Vt|(?-i:W)ash|Wisc?|Wyo|Inc|Cos?|Corp|Pp?tys?|Ltd|Plc"
    "|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|Jr|Sr|Bros|Blvd|Rd|Esq|Bldg|tel|est|ext|sq|etc|al|seq)\\."
)
_BEFORE_NAME = (
    f"(?:{_ACRONYM}|{_ROMAN}|Mr|Mrs|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Mt"
    "|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex"
    "|Wm|Jos|Cie|cf|TREAS|Invt|Elec|Natl|M[ft]g|Dept|Ph)\\."
)
_BEFORE_NUMBER = "(?:ca|figs?|prop|nos?|art|pp|op)\\."
_SENTENCE_WORDS = (
    "(?-i:About|According|Additionally|After|An|A|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Mr\\.|Ms\\."
    "|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Then|There|These|They|This|We|When|While|What|Yet|You)"
)
_HYPHEN = "[-_\u058a\u2010\u2011]"
_ELISION = f"(?:[dol]{_ANY_APOSTROPHE}{_PLAIN})?"
_THING = f"{_ELISION}{_PLAIN}+(?:{_HYPHEN}{_ELISION}{_PLAIN}+)*"
_HYPHENATED = f"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\\.|[A-Za-z0-9\u00ad]+))+"
_TOGETHER = "(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"
_PAUSE = "(?=([,;:\u3001]))"
_PATH = '[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]'
_FILE = (
    "(?:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav"
    "|xml|x|zip)"
)
_NAME = "[A-Za-z0-9_:.-]"
_VALUE = f"(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|[A-Za-z_]{_NAME}*)"
_AT = '[^ \t\n\f\r"<>|(){}\u00a0]'
_HOST = "(?-i:[^ \t\n\f\r\"`'<>|.!?(){},-_$])"
_PHONE = (
    "(?:(?:\\([0-9]{2,3}\\)[ \u00a0]?|(?:\\+\\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    "[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
    "|(?:(?:\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5})"
)


@dataclass(frozen=True)
class _Rule:
    """What a token can look like.

    Attributes:
        pattern: of the token; a group of its own, in a look ahead, holds what must follow: it counts for the length.
        write: makes of the text the tokens that are printed.
        kept: how many characters at the end are left for the next token.
    """

    pattern: re.Pattern[str]
    write: Callable[[str], str] = str
    kept: int = 0


def _rule(pattern: str, write: str | Callable[[str], str] = str, kept: int = 0) -> _Rule:
    compiled = re.compile(pattern, re.IGNORECASE)
    return _Rule(compiled, write if callable(write) else lambda _text: write, kept)


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _parenthesised(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")


def _bracketed(text: str) -> str:
    text = _parenthesised(text)
    for mark, name in (("[", "-lsb-"), ("]", "-rsb-"), ("{", "-lcb-"), ("}", "-rcb-")):
        text = text.replace(mark, name)
    return text


def _money(text: str) -> str:
    return text.replace("\u00a2", "cents").replace("\u00a3", "#").translate(_EURO)


def _quote(text: str) -> str:
    return text.replace("&apos;", "'").translate(_QUOTES)


def _fraction(text: str) -> str:
    return {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3"}.get(text, text)


_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
        **dict.fromkeys("\u0092\u2019\u203a", "'"),
        **dict.fromkeys("\u0093\u201c\u00ab", "``"),
        **dict.fromkeys("\u0094\u201d\u00bb", "''"),
    }
)
_EURO = str.maketrans(dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"))
_WORDS = f"{_WORD}(?:{_WORD}|\\d)*(?:[.!?]{_WORD}(?:{_WORD}|\\d)*)*"
_RULES = tuple(
    _rule(*row)
    for row in (
        (f"{_PLAIN}+(?:\\.{_PLAIN}+)*\\.{_FILE}(?=({_SPACE}|[\n.,?!]))",),
        ("c\\+\\+|[cf]#",),
        ("cannot|'twas", str, 3),
        (f"(?:{_APOSTROPHE}tis|gonna|gotta|lemme|gimme|wanna)(?=([^A-Za-z0-9]))", str, 2),
        (
            f"<(?:[!?][A-Za-z-][^>\r\n]*|[A-Za-z]{_NAME}*(?: +[A-Za-z]{_NAME}*(?: *= *{_VALUE})?)* */?"
            f"|/[A-Za-z]{_NAME}*) *>",
        ),
        ("&(?:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]", "--"),
        ("&amp;", "&"),
        ("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);",),
        (f"{_SHORTENED}(?=({_LETTER}(?!{_PLAIN})))",),
        (f"{_WORDS}(?=({_CLITIC}))", _without_soft_hyphens),
        (f"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*(?=({_NOT}))", _without_soft_hyphens),
        (_WORDS, _without_soft_hyphens),
        (
            f"{_APOSTROPHE}n{_APOSTROPHE}?|[ldj]{_APOSTROPHE}|Dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE}"
            f"|{_APOSTROPHE}em|(?-i:[A-HJ-XZn]){_ANY_APOSTROPHE}{_LETTER}{{2,}}|{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}till?"
            f"|{_LETTER}+[aeiouy]{_ANY_APOSTROPHE}(?-i:[aeiouA-Z]){_LETTER}*|{_APOSTROPHE}cause|cont'd\\.?"
            "|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l",
        ),
        (f"y{_APOSTROPHE}(?=({_LETTER}))",),
        (f"https?://{_PATH}",),
        (
            '(?:www\\.(?:[^ \t\n\f\r"<>|.!?(){},]+\\.)+[a-zA-Z]{2,4}'
            f"|(?:{_HOST}+\\.)+(?:com|net|org|edu))(?:/{_PATH})?",
        ),
        (f"(?:&lt;|<)?[a-zA-Z0-9]{_AT}*@(?:{_AT[:-1]}.]+\\.)*{_AT[:-1]}.]+(?:&gt;|>)?",),
        (f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_WORD}",),
        (f"{_CLITIC}(?=([^A-Za-z]))", _quote),
        (_NOT, _quote),
        ("\\d{1,2}[-/]\\d{1,2}[-/]\\d{2,4}",),
        (f"[-+]?{_NUMBER}", _without_soft_hyphens),
        ("[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)",),
        ("(?:\\d{1,4}[- \u00a0])?\\d{1,4}(?:\\\\?/|\u2044)\\d{1,4}",),
        ("[\u00bc-\u00be\u2153-\u215e]", _fraction),
        (
            f"-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\\.D\\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls|Cap{_APOSTROPHE}n|c{_APOSTROPHE}est",
        ),
        ("[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",),
        ("(?-i:[A-Z]*)\\$|#",),
        ("[\u00a2-\u00a5\u0080\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", _money),
        (f"{_ROMAN}\\.(?=((?:{_SPACE}|\n)+{_SENTENCE_WORDS}(?:{_SPACE}|\n)))", str, 1),
        (_SHORTENED,),
        (_BEFORE_NAME,),
        (f"{_BEFORE_NUMBER}(?=((?:{_SPACE}|\n)?\\d))",),
        (f"{_APOSTROPHE}[0-9][0-9](?=({_SPACE}|\n))",),
        (f"{_WORDS}\\.{_PAUSE}", _without_soft_hyphens),
        (_PHONE, _bracketed),
        ("(?-i:[<>]?[:;=][-o*']?[()DPdpO\\\\{@|\\[\\]])(?=([^A-Za-z0-9]))", _parenthesised),
        (
            "(?-i:[-^x=~<>']_[-^x=~<>']|\\([-^x=~<>'][_.]?[-^x=~<>']\\)|\\([\\^x=~<>']-[\\^x=~<>'`]\\))",
            _parenthesised,
        ),
        ("\"|&quot;|''|``", "''"),
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("<", str),
        (">", str),
        ("[\\[\\](){}]", _bracketed),
        ("-+", lambda text: "--" if 2 <= len(text) <= 4 else text),
        ("\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", "..."),
        ("@+|#+|_+",),
        ("\\*+|(?:\\\\\\*){1,3}",),
        ("[,;:\u3001]",),
        ("[?!]+",),
        ("[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]",),
        ("=",),
        ("/",),
        (f"{_HYPHENATED}\\.{_PAUSE}", _without_soft_hyphens),
        (_HYPHENATED, _without_soft_hyphens),
        (f"{_THING}\\.{_PAUSE}",),
        (_THING,),
        (f"{_TOGETHER}\\.{_PAUSE}", lambda text: text.replace("&amp;", "&")),
        (_TOGETHER, lambda text: text.replace("&amp;", "&")),
        ("'(?=([A-Za-z][^ \t\n\r\u00a0]))",),
        (_CLITIC, _quote),
        ("&nbsp;", ""),
        ("[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}|'|&apos;", _quote),
        ("<<|>>",),
        (
            "[+%&~^|\\\\\u00a6-\u00a9\u00ac\u00ae-\u00b1\u00b4-\u00ba\u00d7\u00f7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
            "\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0964\u0965\u0e4f\u2016\u2017\u2020-\u2023"
            "\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u21ff\u2200-\u2bff"
            "\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]",
        ),
    )
)
# most words of captions: letters before a space, or before a mark that a space or the end follows
_SIMPLE_WORD = re.compile("[A-Za-z]+(?=[ \n]|[,;:!?][ \n]|(\\.)\n)")
_PERIOD_KEPT = re.compile(f"(?:{_SHORTENED}|{_BEFORE_NAME}|{_BEFORE_NUMBER})", re.IGNORECASE)
_LINE_ENDS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
_LINES_SEEN = 2
_ODD_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Return the words of captions in lower case, without punctuation.

    The lexer looks over the end of a caption: a period behind its last letter, or behind `no`, is judged by what the
    next one begins with. So captions are handed over in the order in which the scorer reads them.
    """
    lines = [_LINE_ENDS.sub(" ", caption) for caption in captions]
    last = len(lines) - 1
    behind = ["\n".join(["", *lines[place + 1 : place + 1 + _LINES_SEEN]]) for place in range(last)] + [""]
    return [_tokens(line, rest) for line, rest in zip(lines, behind, strict=False)]


def _tokens(line: str, behind: str) -> list[str]:
    """Return the words of a line.

    Args:
        line: of the text.
        behind: what follows it, a newline first; nothing at the end of all.
    """
    text, tokens, place = line + behind, [], 0
    while place < len(line):
        simple = _SIMPLE_WORD.match(text, place)
        if simple and simple[0].lower() not in _ODD_WORDS and not (simple[1] and _PERIOD_KEPT.match(text, place)):
            tokens.append(simple[0])
            place = simple.end()
            continue
        token, step = _longest(text, place)
        tokens += token.split(" ")
        place += step
    return " ".join(token for token in tokens if token not in LEFT_OUT).lower().split()


def _longest(text: str, place: int) -> tuple[str, int]:
    """Return what is printed of the token that begins at a place, and how far the next one is; nothing for no token."""
    best, longest = None, 0
    for rule in _RULES:
        found = rule.pattern.match(text, place)
        if found and (length := found.end() - place + len((found[1] or "") if found.re.groups else "")) > longest:
            best, longest = (rule, found), length
    if best is None:
        return "", 1
    rule, found = best
    kept = found[0][: len(found[0]) - rule.kept]
    return rule.write(kept), len(kept)
