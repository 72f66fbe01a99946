r"""The rules of the Penn Treebank lexer of `ptb.py`: regular expressions, and what a match becomes.

A rule is what is taken, the context that must follow, and how it is written. The context counts for which match is
the longest, and is not taken. Alternatives stand longest first, since Python takes the first that fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


def _class_of(ranges: str) -> str:
    """Ranges like `41-5a 5f` as the inside of a regular expression's class."""
    return "".join("-".join(rf"\u{int(end, 16):04x}" for end in each.split("-")) for each in ranges.split())


_CHARACTERS = json.loads((Path(__file__).parent / "ptb_characters.json").read_text(encoding="utf-8"))
SHOWN = re.compile(f"[{_class_of(_CHARACTERS['shown'])}]")
"""Characters that are a token where no rule fits; others are dropped."""

DIGIT = f"[{_class_of(_CHARACTERS['digits'])}]"
LETTER = f"[{_class_of(_CHARACTERS['letters'])}]"
LETTER_DIGIT = f"[{_class_of(_CHARACTERS['letters'] + ' ' + _CHARACTERS['digits'])}]"
APOSTROPHE = r"(?:['\u0092\u2019]|&apos;)"
ANY_APOSTROPHE = r"(?:['\u0092\u2019`\u0091\u2018\u201B]|&apos;)"
SPACE = r"[ \t\u00A0\u2000-\u200A\u3000]"
SPACE_LINE = r"[ \t\u00A0\u2000-\u200A\u3000\n]"
DASH = r"(?:(?i:&(?:MD|mdash|ndash);)|[\u0096\u0097\u2013-\u2015])"
TAG = (
    r"<(?:[!?][A-Za-z-][^>\n]*|/?[A-Za-z][A-Za-z0-9_:.-]*"
    r"(?:[ ]+[A-Za-z][A-Za-z0-9_:.-]*(?:[ ]*=[ ]*(?:'[^'\n]*'|\"[^\"\n]*\"|[A-Za-z][A-Za-z0-9_:.-]*))?)*[ ]*/?)[ ]*>"
)
SENTENCE = rf"{SPACE_LINE}(?:{SPACE_LINE}|[A-Z\u00C0-\u00D6\u00D8-\u00DE]|{TAG})"
"""What lets a sentence end before it."""

WORD = rf"{LETTER}{LETTER_DIGIT}*(?:[.!?]{LETTER}{LETTER_DIGIT}*)*"
NUMERAL = rf"(?:{DIGIT}*(?:[.:,\u00AD\u066B\u066C]{DIGIT}+)+|{DIGIT}+)"
NUMBER = rf"[-+]?{NUMERAL}"
FRACTION = rf"(?:{DIGIT}{{1,4}}[- \u00A0])?{DIGIT}{{1,4}}(?:\\?/|\u2044){DIGIT}{{1,4}}"
DATE = rf"{DIGIT}{{1,2}}[-/]{DIGIT}{{1,2}}[-/]{DIGIT}{{2,4}}"
_PART = rf"(?:[dDoOlL]{ANY_APOSTROPHE}{LETTER_DIGIT})?{LETTER_DIGIT}+"
THING = rf"{_PART}(?:[-_\u058A\u2010\u2011]{_PART})*"
CAPITALS = r"[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+"
_HYPHENED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
SLASHED = rf"{_HYPHENED}(?:\\?/{_HYPHENED}){{1,2}}"
HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00AD]+))+"
CLITIC = rf"{APOSTROPHE}(?i:re|ve|ll|[msd])"

ACRONYM = r"(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)|[A-Za-z](?:\.[A-Za-z])+)"
_BEGINS = (
    r"A|About|According|Additionally|After|An|As|At|But|Earlier|He|Here|Her|However|If|In|It|Last|Many|More|Mr\.|Ms\.|"
    "Now|Once|One|Other|Our|She|Since|So|Some|Such|That|Their|Then|There|These|The|They|This|We|When|While|What|Yet|You"
)
BEGINNING = rf"{SPACE_LINE}+(?:{_BEGINS}|{_BEGINS.upper()}|{TAG}){SPACE_LINE}"
"""Words that begin a sentence after an acronym."""
_ENDING = (
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thurs?|Fri|"
    "Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt|Wisc?|Wyo|"
    r"Inc|Cos?|Corp|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|Jr|Sr|Bros|(?:Ed|Ph)\.D|Blvd|Rd|Esq|Bldg|"
    "tel|est|ext|sq|etc|al|seq"
)
# these are words, too, when they have no capital
_ENDING_CAPITAL = (
    "Ark|ARK|Az|AZ|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Miss|MISS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH|Pty|pty|Pte|pte"
)
_INSIDE = (
    "Messrs|Mrs|Mr|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|"
    "Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|"
    r"vs|Alex|Wm|Jos|Cie|a\.k\.a|cf|TREAS|Invt|Elec|Natl|Dept|Ph"
)
ENDING = rf"(?:(?i:{_ENDING})|{_ENDING_CAPITAL})\."
"""Abbreviations that may end a sentence, and then have a full stop besides."""
INSIDE = rf"(?:(?i:{_INSIDE})|[Mm][ft]g)\."
"""Abbreviations that do not."""
BEFORE_NUMBER = r"(?i:ca|figs?|prop|nos?|art|pp?|op)\."

PHONE = (
    r"(?:(?:\([0-9]{2,3}\)[ \u00A0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00A0])?[0-9]{2,4}[- \u00A0])[0-9]{3,4}[- \u00A0]?"
    r"[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})"
)
SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
SMILEY_EAST = r"(?:[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))"
URL = r"https?://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]"
LIKELY_URL = (
    r"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?:com|net|org|edu))"
    r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?"
)
MAIL = (
    r"(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00A0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00A0]+\.)*"
    r"[^ \t\n\f\r\"<>|(){}.\u00A0]+(?:&gt;|>)?"
)
_EXTENSION = (
    "bat|bmp|class|cgi|cpp|dll|docx?|exe|gif|gz|html?|java|jar|jpe?g|mov|mp3|pdf|php|png|pptx?|py|sql|tar|txt|wav|"
    "xlsx?|xml|zip|pl|ps|c|h|x"
)
FILE = rf"{LETTER_DIGIT}+(?:\.{LETTER_DIGIT}+)*\.(?:{_EXTENSION})"
WITH_APOSTROPHE = (
    rf"(?:(?i:{APOSTROPHE}n{APOSTROPHE}?|[ldj]{APOSTROPHE}|dunkin{APOSTROPHE}|somethin{APOSTROPHE}|ol{APOSTROPHE}|"
    rf"{APOSTROPHE}em|{APOSTROPHE}[2-9]0s|{APOSTROPHE}till?|{APOSTROPHE}cause|cont'd\.?|(?-i:'twould)|nor'easter|"
    rf"c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{ANY_APOSTROPHE}o)|[A-HJ-XZn]{APOSTROPHE}{LETTER}{{2,}}|"
    rf"{LETTER}+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z]{LETTER}*)"
)


class Rule(NamedTuple):
    """One rule: the group `t` of its pattern is taken, `keep` characters of it if given, and written by `write`."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]
    keep: int | None = None


def _one_token(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _as_it_is(text: str) -> str:
    return text


def _rule(
    taken: str, context: str = "", *, write: Callable[[str], str] = _as_it_is, keep: int | None = None, flags: int = 0
) -> Rule:
    return Rule(re.compile(rf"(?P<t>{taken}){context}", flags), write, keep)


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _apostrophes(text: str) -> str:
    return re.sub(r"['\u0092\u2019]|&apos;", "'", text)


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _quotes(text: str) -> str:
    out = text.replace("&apos;", "'")
    out = re.sub(r"[\u0091\u2018\u201B\u2039]", "`", out)
    out = re.sub(r"[\u0092\u2019\u203A]", "'", out)
    out = re.sub(r"[\u0093\u201C\u00AB]", "``", out)
    return re.sub(r"[\u0094\u201D\u00BB]", "''", out)


def _currency(text: str) -> str:
    return re.sub(r"[\u0080\u00A4\u20A0\u20AC]", "$", text.replace("\u00a2", "cents").replace("\u00a3", "#"))


_FRACTIONS = {
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip

_I = re.IGNORECASE
RULES: tuple[Rule, ...] = (
    _rule(TAG, write=_one_token),
    _rule(DASH, write=lambda text: "--"),
    _rule(r"&amp;", write=lambda text: "&", flags=_I),
    _rule(r"cannot", keep=3, flags=_I),
    _rule(r"gonna|gotta|lemme|gimme|wanna", keep=3, flags=_I),
    _rule(r"'(?:tis|twas)", keep=2, flags=_I),
    _rule(WORD, CLITIC, write=_no_soft_hyphens),
    _rule(r"[A-Za-z]*[A-MO-Za-mo-z]", rf"[nN]{APOSTROPHE}[tT]"),
    _rule(WORD, write=_no_soft_hyphens),
    _rule(WITH_APOSTROPHE),
    _rule(rf"[yY]{APOSTROPHE}", LETTER),
    _rule(URL, flags=_I),
    _rule(LIKELY_URL),
    _rule(MAIL),
    _rule(r"@[a-zA-Z_][a-zA-Z_0-9]*"),
    _rule(rf"#{LETTER}+"),
    _rule(CLITIC, r"(?:[^A-Za-z]|\Z)", write=_apostrophes),
    _rule(rf"[nN]{APOSTROPHE}[tT]", r"(?:[^A-Za-z]|\Z)", write=_apostrophes),
    _rule(DATE),
    _rule(NUMBER, write=_no_soft_hyphens),
    _rule(r"[\u207A\u207B\u208A\u208B]?(?:[\u2070\u00B9\u00B2\u00B3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule(FRACTION, write=_one_token),
    _rule(r"[\u00BC-\u00BE\u2153-\u215E]", write=lambda text: _FRACTIONS.get(text, text)),
    _rule(r"-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls|cap'n|c'est", flags=_I),
    _rule(rf"{APOSTROPHE}[0-9][0-9]", SPACE_LINE),
    _rule(THING, write=_no_soft_hyphens),
    _rule(CAPITALS, write=lambda text: re.sub("&amp;", "&", text, flags=_I)),
    _rule(SLASHED),
    _rule(r"[A-Z]*\$|#"),
    _rule(r"[\u00A2-\u00A5\u0080\u20A0\u20AC\u060B\u0E3F\u20A4\uFFE0\uFFE1\uFFE5\uFFE6]", write=_currency),
    _rule(rf"(?:{WORD}|{THING}|{CAPITALS}|{HYPHENED})\.", r"[,;:\u3001]"),
    _rule(BEFORE_NUMBER, rf"{SPACE_LINE}?[0-9]"),
    _rule(ENDING, rf"(?:{SENTENCE}|\Z)", keep=-1),
    _rule(ENDING, r"(?s:..)"),
    _rule(ENDING),
    _rule(INSIDE),
    _rule(rf"{ACRONYM}\.", BEGINNING, keep=-1),
    _rule(rf"{ACRONYM}\."),
    _rule(r"[A-Za-z]", rf"\.{BEGINNING}"),
    _rule(r"[A-Za-z]\."),
    _rule(FILE, r"(?=[ \n.,;:!?'\")]|$)"),
    _rule(HYPHENED, write=_no_soft_hyphens),
    _rule(PHONE, write=lambda text: _one_token(_brackets(text))),
    _rule(SMILEY, r"[^A-Za-z0-9]", write=_brackets),
    _rule(SMILEY_EAST, write=_brackets),
    _rule(r"\"|&quot;", r"[A-Za-z0-9$]", write=lambda text: "``"),
    _rule(r"\"|&quot;", write=lambda text: "''"),
    _rule(r"&(?:quot|apos);", flags=_I),
    _rule(r"<|(?i:&lt;)", write=lambda text: "<"),
    _rule(r">|(?i:&gt;)", write=lambda text: ">"),
    _rule(r"[\[\]]", write=lambda text: "-LSB-" if text == "[" else "-RSB-"),
    _rule(r"[{}]", write=lambda text: "-LCB-" if text == "{" else "-RCB-"),
    _rule(r"[()]", write=_brackets),
    _rule(r"-+", write=lambda text: "--" if 3 <= len(text) <= 4 else text),
    _rule(r"(?:\.[ \u00A0]){2,4}\.|\.{3,5}|[\u0085\u2026]", write=lambda text: "..."),
    _rule(r"@+|#+|_+"),
    _rule(r"\*+|(?:\\\*){1,3}"),
    _rule(r"[,;:\u3001]"),
    _rule(r"[?!]+"),
    _rule(r"[.\u00A1\u00BF\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002]"),
    _rule(r"="),
    _rule(r"/"),
    _rule(r"'", r"[A-Za-z][^ \t\n\u00A0]", write=lambda text: "`"),
    _rule(CLITIC, write=_apostrophes),
    _rule(rf"[nN]{APOSTROPHE}[tT]", write=_apostrophes),
    _rule(rf"''|[`\u2018-\u201F\u0091-\u0094\u2039\u203A\u00AB\u00BB]{{1,2}}|{APOSTROPHE}", write=_quotes),
    _rule(r"<<|>>"),
    _rule(r"[Cc]\+\+|[CcFf]#"),
)
