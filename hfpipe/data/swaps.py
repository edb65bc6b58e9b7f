"""Words that take each other's place, and rows of a source with them swapped (counterfactual data augmentation).

What a model learns of a group it learns from texts that speak of one group and not of another. A row that stands beside
its swapped form says the same of both. `gender` swaps pronouns and nouns, in English with their grammar (*her* is *him*
or *his* by what follows) and in Chinese; `names` swaps first names between two groups, women's for women's and men's
for men's, so that pronouns still fit.

Sources: Zhao et al. 2018 (https://arxiv.org/abs/1804.06876) and Lu et al. 2020 (https://arxiv.org/abs/1807.11714); Hall
Maudslay et al. 2019 (https://arxiv.org/abs/1909.00871) for exchange in place of joining. The names are those of
Bertrand and Mullainathan 2004 (https://doi.org/10.1257/0002828042002561) that are no other words.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hfpipe.recipe import Augment

Words = Mapping[str, str]  # a word and what takes its place

_GENDER = """
    he she  himself herself  man woman  men women  boy girl  boys girls  father mother  fathers mothers  dad mom
    dads moms  daddy mommy  son daughter  sons daughters  brother sister  brothers sisters  husband wife
    husbands wives  uncle aunt  uncles aunts  nephew niece  nephews nieces  grandfather grandmother
    grandfathers grandmothers  grandpa grandma  grandson granddaughter  grandsons granddaughters  king queen
    kings queens  prince princess  princes princesses  gentleman lady  gentlemen ladies  actor actress
    actors actresses  waiter waitress  waiters waitresses  hero heroine  heroes heroines  male female  males females
    boyfriend girlfriend  boyfriends girlfriends  bridegroom bride  bridegrooms brides  policeman policewoman
    policemen policewomen  businessman businesswoman  businessmen businesswomen  salesman saleswoman
    salesmen saleswomen  chairman chairwoman  chairmen chairwomen  spokesman spokeswoman  spokesmen spokeswomen
    stepfather stepmother  stepson stepdaughter  stepbrother stepsister  fatherhood motherhood  boyhood girlhood
    landlord landlady  schoolboy schoolgirl  schoolboys schoolgirls  godfather godmother  widower widow
    widowers widows  wizard witch  wizards witches  monk nun  monks nuns  mr mrs
    他 她  他们 她们  男人 女人  男性 女性  男孩 女孩  男生 女生  男子 女子  男士 女士  男友 女友  男朋友 女朋友
    父亲 母亲  爸爸 妈妈  儿子 女儿  哥哥 姐姐  弟弟 妹妹  爷爷 奶奶  外公 外婆  丈夫 妻子  老公 老婆  国王 女王
    王子 公主  叔叔 阿姨  伯伯 姑姑  新郎 新娘  孙子 孙女  侄子 侄女  男演员 女演员
"""
_NAMES = """
    Emily Aisha  Anne Keisha  Jill Tamika  Allison Lakisha  Laurie Tanisha  Sarah Latoya  Meredith Latonya
    Todd Rasheed  Neil Tremayne  Geoffrey Kareem  Brett Darnell  Brendan Tyrone  Greg Jamal  Matthew Hakim
    Brad Jermaine
"""
# Where 他 is a part of another word.
_NOT_A_PRONOUN = r"(?<![其吉排利])他(?![乡国日杀])"
# What may follow `her` as an object, or `his` alone; another word is what is owned.
_AFTER_OBJECTS = """
    a about above after again against ago all alone along already also always am an and another any anything anyway are
    around as aside at away be because been before behind being below beside besides between both but by can could did
    do does done down during each either else enough even ever every everything for forever from get go goodbye had has
    have he her here hers herself him himself his how however i if in inside instead into is it its itself just later
    like may maybe me might mine more much must my near never nevertheless no nor not nothing now of off often on once
    onto or our out outside over perhaps please said say shall she should since so some something soon still such than
    that the their them themselves then there therefore these they this those though through till to today together
    tomorrow tonight too toward towards twice under unless until up upon upstairs us was we were what whatever when
    whenever where whether which while who whom whose why will with within without would yes yesterday yet you your
    badly carefully closely completely deeply directly exactly finally gently immediately kindly nearly personally
    politely quickly quietly really sadly slowly softly suddenly tightly warmly
"""
_FOLLOWS = frozenset(_AFTER_OBJECTS.split())
_NEXT = re.compile(r"[ \t\n]+([^\W\d_][\w'\u2019-]*)")
_HAN = re.compile(r"[\u3400-\u9fff]")


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return {one: other for pair in zip(words[::2], words[1::2], strict=True) for one, other in (pair, pair[::-1])}


LISTS: dict[str, dict[str, str]] = {
    "gender": _pairs(_GENDER) | {"him": "her", "hers": "his", "ms": "mr", "his": "", "her": ""},  # by what follows
    "names": _pairs(_NAMES),
}


def swapped(text: str, swap: str | Sequence[Sequence[str]]) -> str:
    """Returns a text with the listed words swapped, all at once; capitals are kept.

    Args:
        text: A text.
        swap: `gender`, `names`, or lists of words each of which becomes the next, and the last the first.
    """
    if isinstance(swap, str):
        return replaced(text, LISTS[swap], as_written=swap == "names")
    return replaced(text, {one: words[(place + 1) % len(words)] for words in swap for place, one in enumerate(words)})


def replaced(text: str, words: Words, *, as_written: bool = False) -> str:
    """Returns a text with whole words replaced, all at once; a capital at the beginning, or of all letters, is kept.

    Args:
        text: A text.
        words: What takes the place of each word; nothing for `his` and `her`, where it follows from the next word.
        as_written: Whether capitals have to be those of the list.
    """
    known = {word.casefold(): other for word, other in words.items()}

    def other(match: re.Match[str]) -> str:
        found = match[0]
        new = words.get(found) or known[found.casefold()] or _pronoun(found.casefold(), text, match.end())
        if found.isupper() and len(found) > 1:
            return new.upper()
        return new[:1].upper() + new[1:] if found[:1].isupper() else new

    either = "|".join(map(_pattern, sorted(words, key=len, reverse=True)))
    return re.sub(either, other, text, flags=re.NOFLAG if as_written else re.IGNORECASE)


def _pattern(word: str) -> str:
    """A word as a whole; a Chinese one stands without a gap beside others."""
    if word == "他":
        return _NOT_A_PRONOUN
    begin, end = ("" if _HAN.match(letter) else side for letter, side in ((word[0], r"(?<!\w)"), (word[-1], r"(?!\w)")))
    return f"{begin}{re.escape(word)}{end}"


def _pronoun(word: str, text: str, end: int) -> str:
    """`his` and `her`, swapped: whether something follows that is owned decides between two forms."""
    owned = False
    if following := _NEXT.match(text, end):
        owned = following[1].casefold() not in _FOLLOWS
    if word == "his":
        return "her" if owned else "hers"
    return "his" if owned else "him"


def augmented(rows: Dataset | IterableDataset, augment: Augment, seed: int = 0) -> Dataset | IterableDataset:
    """Returns rows of which those with a listed word are joined by their swapped form, or exchanged for it.

    Args:
        rows: Rows of one format.
        augment: What is swapped and how.
        seed: Of the choice of the rows that are exchanged, which follows from their text too.
    """

    def changed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in batch}
        for place in range(len(next(iter(batch.values()), []))):
            row = {name: values[place] for name, values in batch.items()}
            new = {name: value if name in _AS_IS else _swapped(value, augment.swap) for name, value in row.items()}
            given = [row] if new == row or augment.how == "join" or not _chosen(row, seed) else []
            if new != row and (augment.how == "join" or not given):
                if new.get("id") is not None:
                    new["id"] = f"{new['id']} swapped"
                given.append(new)
            for one in given:
                for name, value in one.items():
                    made[name].append(value)
        return made

    columns = {"features": rows.features} if rows.features is not None else {}
    return rows.map(changed, batched=True, **columns)


_AS_IS = frozenset(("id", "label", "labels", "weight", "train", "src_lang", "tgt_lang", "tools"))


def _swapped(value: Any, swap: str | Sequence[Sequence[str]]) -> Any:
    """A value with every text in it swapped; of a conversation what is said, and not who says it."""
    if isinstance(value, str):
        return swapped(value, swap)
    if isinstance(value, list):
        return [_swapped(one, swap) for one in value]
    if isinstance(value, dict):
        return {key: _swapped(one, swap) if key == "content" else one for key, one in value.items()}
    return value


def _chosen(row: Mapping[str, Any], seed: int) -> bool:
    """Returns True if a row is exchanged, as half of them are."""
    return bool(zlib.crc32(f"{seed} {sorted(row.items(), key=lambda item: item[0])}".encode()) & 1)
