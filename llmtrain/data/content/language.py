"""Language identification over batches of documents.

The default model is the one that the package py3langid carries: a naive Bayes classifier over byte n-grams
found by a finite automaton (Lui and Baldwin 2012, "langid.py", ACL system demonstrations; retrained for 139
languages in py3langid 0.4.0). The package walks the automaton in Python; here a compiled loop does, with the
same tables and the same scores. Any fastText model with languages as labels may take its place. How the
candidates were compared: docs/data_content.md.

Codes are those of ISO 639-1 where a language has one, else of ISO 639-3. The standard form of a macrolanguage
has the macrolanguage's code: cmn is zh, arb is ar, pes is fa. `und` stands for a text without any feature,
`zxx` for one without language.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from py3langid import langid

from llmtrain.compiled import compiled
from llmtrain.data.content import fasttext
from llmtrain.data.content.config import LanguageConfig
from llmtrain.data.content.sample import NUM_PIECES, spread

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

UNDETERMINED = "und"

_TWO_LETTERS = {
    pair[:3]: pair[3:]
    for pair in (  # noqa: SIM905 - 207 pairs read better this way
        "aaraa abkab afraf akaak amham araar argan asmas avaav aveae aymay azeaz bakba bambm belbe benbn "
        "bisbi bodbo bosbs brebr bulbg catca cescs chach chece chucu chvcv corkw cosco crecr cymcy danda "
        "deude divdv dzodz ellel engen epoeo estet euseu eweee faofo fasfa fijfj finfi frafr fryfy fulff "
        "glagd glega glggl glvgv grngn gujgu hatht hauha hbssh hebhe herhz hinhi hmoho hrvhr hunhu hyehy "
        "iboig idoio iiiii ikuiu ileie inaia indid ipkik islis itait javjv jpnja kalkl kankn kasks katka "
        "kaukr kazkk khmkm kikki kinrw kirky komkv konkg korko kuakj kurku laolo latla lavlv limli linln "
        "litlt ltzlb lublu luglg mahmh malml marmr mkdmk mlgmg mltmt monmn mrimi msams myamy nauna navnv "
        "nblnr ndend ndong nepne nldnl nnonn nobnb norno nyany ocioc ojioj orior ormom ossos panpa plipi "
        "polpl porpt pusps quequ rohrm ronro runrn rusru sagsg sansa sinsi slksk slvsl smese smosm snasn "
        "sndsd somso sotst spaes sqisq srdsc srpsr sswss sunsu swasw swesv tahty tamta tattt telte tgktg "
        "tgltl thath tirti tonto tsntn tsots tuktk turtr twitw uigug ukruk urdur uzbuz venve vievi volvo "
        "wlnwa wolwo xhoxh yidyi yoryo zhaza zhozh zulzu "  # ISO 639-3 registry, column Part1
        "arbar ayray azjaz cmnzh ekket fuvff gazom guggn khkmn kmrku knckr lvslv npine oryor pbtps pesfa "
        "pltmg swhsw uznuz yddyi zsmms"  # the standard form of a macrolanguage, by the macrolanguage's code
    ).split()
}
_WITH_SCRIPT = {"als": "sq"}
"""Tosk Albanian in ISO 639-3; without a script after it `als` is Wikipedia's name of Alemannic."""


def language_code(label: str) -> str:
    """The code of a model's label: `__label__en`, `eng_Latn`, `zh-Hant` and `cmn` are en, en, zh and zh."""
    name = label.removeprefix(fasttext.LABEL_PREFIX)
    code, _, script = name.replace("-", "_").partition("_")
    if code == "roa":  # Wikipedia's roa-tara and the like: no code of one language
        return name
    if script:
        code = _WITH_SCRIPT.get(code, code)
    return _TWO_LETTERS.get(code, code)


@compiled
def _naive_bayes(
    text: Any,
    offsets: Any,
    moves: Any,
    rows: Any,
    outputs: Any,
    weights: Any,
    priors: Any,
    log1p: Any,
    twins: Any,
) -> Any:
    """Index of the likeliest class and its probability, for each document; -1 and 0 without a feature.

    Features are the states of the automaton that put one out; their score is log(1 + count) times the
    weight. The probability is a softmax at temperature sqrt(bytes), as in py3langid. `twins` are pairs of
    classes with one label: the first takes the second's probability.
    """
    num_documents = len(offsets) - 1
    num_classes = weights.shape[1]
    best = np.full(num_documents, -1, dtype=np.int64)
    probability = np.zeros(num_documents, dtype=np.float32)
    counts = np.zeros(weights.shape[0], dtype=np.int32)
    seen = np.empty(4096, dtype=np.int32)
    scores = np.empty(num_classes, dtype=np.float32)
    for document in range(num_documents):
        begin, end = offsets[document], offsets[document + 1]
        if end - begin > len(seen):
            seen = np.empty(2 * (end - begin), dtype=np.int32)
        num_seen = 0
        state = 0
        for at in range(begin, end):
            state = moves[np.int64(rows[state]) * 256 + text[at]]
            feature = outputs[state]
            if feature >= 0:
                if counts[feature] == 0:
                    seen[num_seen] = feature
                    num_seen += 1
                counts[feature] += 1
        if num_seen == 0:
            continue
        scores[:] = priors
        for number in range(num_seen):
            feature = seen[number]
            count = counts[feature]
            counts[feature] = 0
            factor = log1p[count] if count < len(log1p) else np.float32(np.log1p(count))
            row = weights[feature]
            for label in range(num_classes):
                scores[label] += factor * row[label]
        highest = scores[0]
        for label in range(num_classes):
            highest = max(highest, scores[label])
        cooled = np.float32(1.0 / np.sqrt(end - begin))
        total = np.float32(0)
        for label in range(num_classes):
            scores[label] = np.exp((scores[label] - highest) * cooled)
            total += scores[label]
        for pair in range(len(twins)):
            scores[twins[pair, 0]] += scores[twins[pair, 1]]
            scores[twins[pair, 1]] = 0
        top = 0
        for label in range(num_classes):
            if scores[label] > scores[top]:
                top = label
        best[document] = top
        probability[document] = scores[top] / total
    return best, probability


@compiled
def _without_small_letters(text: Any, offsets: Any) -> Any:
    """Documents that hold no lower-case letter of ASCII."""
    without = np.ones(len(offsets) - 1, dtype=np.bool_)
    for document in range(len(offsets) - 1):
        for at in range(offsets[document], offsets[document + 1]):
            if 97 <= text[at] <= 122:
                without[document] = False
                break
    return without


class _Model(Protocol):
    """Numbers of labels (-1: no feature known) and probabilities for a batch."""

    labels: list[str]

    def best(self, text: Bytes, offsets: Offsets) -> tuple[Offsets, npt.NDArray[np.float32]]: ...


class NaiveBayes:
    """py3langid's model over batches."""

    def __init__(self) -> None:
        model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        self.labels: list[str] = list(model.nb_classes)
        self._moves = np.asarray(model.tk_nextmove)
        self._rows = np.asarray(model.tk_row)
        self._outputs = np.asarray(model.tk_output, dtype=np.int32)
        self._weights = np.asarray(model.nb_ptc, dtype=np.float32)
        self._priors = np.asarray(model.nb_pc, dtype=np.float32)
        self._log1p = np.log1p(np.arange(4096, dtype=np.float32))
        first: dict[str, int] = {}
        twins = [
            (first[label], number)
            for number, label in enumerate(self.labels)
            if first.setdefault(label, number) != number
        ]
        self._twins = np.array(twins, dtype=np.int64).reshape(-1, 2)

    def best(self, text: Bytes, offsets: Offsets) -> tuple[Offsets, npt.NDArray[np.float32]]:
        text, offsets = _lowered(text, offsets)
        best, probability = _naive_bayes(
            text,
            offsets,
            self._moves,
            self._rows,
            self._outputs,
            self._weights,
            self._priors,
            self._log1p,
            self._twins,
        )
        return best, probability


def _lowered(text: Bytes, offsets: Offsets) -> tuple[Bytes, Offsets]:
    """Documents that are upper case throughout become lower case: the model knows little else."""
    candidates = np.flatnonzero(_without_small_letters(text, offsets))
    lowered = {}
    for document in candidates.tolist():
        decoded = text[offsets[document] : offsets[document + 1]].tobytes().decode()
        if decoded.isupper():
            lowered[document] = decoded.lower().encode()
    if not lowered:
        return text, offsets
    parts = [
        lowered.get(document, text[offsets[document] : offsets[document + 1]].tobytes())
        for document in range(len(offsets) - 1)
    ]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), dtype=np.uint8), np.concatenate(
        [np.zeros(1, dtype=np.int64), np.cumsum(lengths)]
    )


class Identifier:
    """Codes and probabilities of the languages of documents."""

    def __init__(self, model: _Model, sample_bytes: int | None) -> None:
        self._model = model
        self._sample_bytes = sample_bytes
        self._label_codes = [language_code(label) for label in model.labels]
        self.codes = tuple(sorted({*self._label_codes, UNDETERMINED}))
        """Every code that `identify` can return."""

    @classmethod
    def load(cls, cfg: LanguageConfig) -> Identifier:
        """Read the model that `cfg` names.

        Raises:
            DataError: a model file that cannot be used.
        """
        model: _Model = (
            NaiveBayes() if cfg.model is None else fasttext.Predictor(fasttext.read_model(Path(cfg.model)))
        )
        return cls(model, cfg.sample_bytes)

    def identify(self, text: Bytes, offsets: Offsets) -> tuple[list[str], npt.NDArray[np.float32]]:
        """The code of each document's language, and its probability: 0 to 1, 0 with the code `und`."""
        if self._sample_bytes is not None:
            text, offsets = spread(text, offsets, self._sample_bytes, NUM_PIECES)
        best, probability = self._model.best(text, offsets)
        return [
            UNDETERMINED if number < 0 else self._label_codes[number] for number in best.tolist()
        ], probability
