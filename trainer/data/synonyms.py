"""Tables of synonyms: WordNet's (the asset `wordnet`), or a user's own file of the same form. No torch, no rank talks."""

from collections.abc import Mapping
from pathlib import Path

from trainer.data.assets import asset_path
from trainer.errors import DataError

Synonyms = Mapping[str, tuple[str, ...]]
"""Word in lower case -> its synonyms, the likeliest first."""

FUNCTION_WORDS = frozenset(
    "a about above after again against all am an and any are as at be because been before being below between both but by can cannot "
    "could did do does doing down during each few for from further had has have having he her here hers him his how i if in into is it "
    "its itself just me more most much my no nor not now of off on once one only or other our out over own same she should so some such "
    "than that the their them then there these they this those through to too under until up upon us very was we were what when where "
    "which while who whom why will with would you your".split()
)
"""English words that WordNet knows as something else, such as `in` (inch) and `as` (arsenic); they keep their place."""


def load_synonyms(source: str | None) -> Synonyms:
    """WordNet's table, or that of a file. DataError for a file that cannot be read or is no table, and where WordNet cannot be fetched."""
    if source is None:
        table = read_synonyms(asset_path("wordnet") / "synonyms.tsv", "asset:wordnet")
        return {word: others for word, others in table.items() if word not in FUNCTION_WORDS}
    return read_synonyms(Path(source).expanduser(), source)


def read_synonyms(file: Path, name: str) -> Synonyms:
    """Lines of `word TAB synonym TAB synonym ...`; empty ones are passed over. name: of the file, for messages."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.augment.synonyms ({name}) cannot be read ({error}); give a UTF-8 file of lines `word TAB synonym TAB synonym ...`"
        ) from None
    table = {}
    for number, line in enumerate(lines, start=1):
        word, *others = (part.strip() for part in line.split("\t"))
        if bool(word) != any(others):
            raise DataError(
                f"data.augment.synonyms ({name}), line {number} ({line!r:.80}): must be a word and its synonyms, with tabs between them"
            )
        if word:
            table[word.lower()] = tuple(filter(None, others))
    if not table:
        raise DataError(f"data.augment.synonyms ({name}) holds no word; give lines `word TAB synonym TAB synonym ...`")
    return table
