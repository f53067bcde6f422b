"""Tables of word vectors: rows equal loops over the table, gensim's and model2vec's rules."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from tiny_transformers import make_text_folder

from sktransfer import PretrainedTextExtractor, load, save

gensim = pytest.importorskip("gensim")

WORDS = ["the", "film", "is", "good", "bad", "not", "very", "dull", "don", "fine"]
WORDS.insert(9, "\x85")  # a word of GloVe, which str.splitlines() takes for a new line
TEXTS = [
    "The film is GOOD, very good!",
    "bad; not fine",
    "unknown words only here",
    "",
    "don't",
    "the the the film",
]
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(len(WORDS), 5)).astype(np.float32)


def mean_of(text, words=WORDS, table=TABLE):
    """The mean of the vectors of a text's words, by a loop."""
    places = {word: i for i, word in enumerate(words)}
    found = text.lower().replace("'", " ").replace(",", " ").replace("!", " ").replace(";", " ")
    rows = [table[places[word]] for word in found.split() if word in places]
    return np.mean(rows, axis=0) if rows else np.zeros(table.shape[1])


def write_glove(path):
    lines = [f"{word} {' '.join(map(str, row))}" for word, row in zip(WORDS, TABLE, strict=True)]
    path.write_text("\n".join(lines) + "\n")


def write_word2vec(path, binary=False):
    vectors = gensim.models.KeyedVectors(TABLE.shape[1])
    vectors.add_vectors(WORDS, TABLE)
    vectors.save_word2vec_format(str(path), binary=binary)


def write_npy(path, words):
    np.save(path, TABLE)
    if words == ".json":
        path.with_suffix(words).write_text(json.dumps({w: i for i, w in enumerate(WORDS)}))
    else:
        path.with_suffix(words).write_text("\n".join(WORDS))


WRITE = {
    "glove.txt": write_glove,
    "word2vec.txt": write_word2vec,
    "word2vec.bin": lambda path: write_word2vec(path, binary=True),
    "word2vec.bin.gz": lambda path: write_word2vec(path, binary=True),
    "list.npy": lambda path: write_npy(path, ".txt"),
    "dict.npy": lambda path: write_npy(path, ".json"),
}


@pytest.fixture
def table(tmp_path):
    write_glove(tmp_path / "glove.txt")
    return f"vectors:{tmp_path / 'glove.txt'}"


@pytest.mark.parametrize("name", WRITE)
def test_means_equal_a_loop_over_the_table(name, tmp_path):
    WRITE[name](tmp_path / name)
    extractor = PretrainedTextExtractor(f"vectors:{tmp_path / name}").fit(TEXTS)
    got = extractor.transform(TEXTS)
    np.testing.assert_allclose(got, [mean_of(text) for text in TEXTS], rtol=1e-5, atol=1e-6)
    assert len(pickle.dumps(extractor)) < 4000
    stem = name.removesuffix(".txt").replace(".", "_")
    assert extractor.get_feature_names_out()[0] == f"{stem}_000"


def test_maximum(table):
    got = PretrainedTextExtractor(table, pooling="max").fit_transform(["good film", "very"])
    expected = [np.maximum(TABLE[3], TABLE[1]), TABLE[6]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_table_with_capitals_is_read_as_written(tmp_path):
    path = tmp_path / "cased.txt"
    path.write_text("Paris 1 0\nparis 0 1\ngood 2 2\n")
    got = PretrainedTextExtractor(f"vectors:{path}").fit_transform(["Paris", "paris", "GOOD"])
    np.testing.assert_array_equal(got, [[1, 0], [0, 1], [2, 2]])


def test_subwords_equal_those_of_gensim(tmp_path):
    model = gensim.models.FastText(
        [text.lower().split() for text in TEXTS if text] * 3,
        vector_size=6,
        min_count=1,
        bucket=50,
        epochs=1,
        seed=0,
        workers=1,
    )
    path = tmp_path / "fasttext.bin"
    gensim.models.fasttext.save_facebook_model(model, str(path))
    extractor = PretrainedTextExtractor(f"vectors:{path}")
    got = extractor.fit_transform(["goodness", "film goodness", "x"])
    word = model.wv.get_vector
    expected = [word("goodness"), (word("film") + word("goodness")) / 2, word("x")]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    save(extractor, tmp_path / "model", standalone=True)
    path.unlink()
    np.testing.assert_array_equal(
        load(tmp_path / "model").transform(["goodness", "film goodness", "x"]), got
    )


def naive_sif(train, texts):
    """Arora et al.: a / (a + p(w)) over the words of `train`, less the first direction."""
    counted = CountVectorizer(vocabulary=WORDS, token_pattern=r"[a-z]+")
    counts = counted.transform(train).toarray()
    share = counts.sum(0) / counts.sum()

    def rows(some):
        n = counted.transform(some).toarray()
        return n @ (TABLE * (1e-3 / (1e-3 + share))[:, None]) / np.maximum(1, n.sum(1))[:, None]

    u = np.linalg.svd(rows(train))[2][0]
    got = rows(texts)
    return got - np.outer(got @ u, u)


def test_smooth_inverse_frequency(table):
    train = TEXTS * 2
    extractor = PretrainedTextExtractor(table, pooling="sif").fit(train)
    expected = naive_sif(train, TEXTS)
    np.testing.assert_allclose(extractor.transform(TEXTS), expected, rtol=1e-4, atol=1e-5)


def test_inverse_document_frequency(table):
    extractor = PretrainedTextExtractor(table, pooling="tfidf").fit(TEXTS)
    tfidf = TfidfVectorizer(vocabulary=WORDS, token_pattern=r"[a-z]+", norm="l1").fit(TEXTS)
    expected = tfidf.transform(TEXTS).toarray() @ TABLE
    np.testing.assert_allclose(extractor.transform(TEXTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["sif", "tfidf", "auto"])
@pytest.mark.parametrize("standalone", [False, True])
def test_save_and_load(pooling, standalone, table, tmp_path):
    extractor = PretrainedTextExtractor(table, pooling=pooling, on_error="zero").fit(TEXTS)
    expected = extractor.transform([*TEXTS, None])
    assert len(extractor.bad_texts_) == 1
    np.testing.assert_array_equal(expected[-1], np.zeros(5))
    save(extractor, tmp_path / "model", standalone=standalone)
    if standalone:
        (tmp_path / "glove.txt").unlink()
    trusted = () if standalone else table
    loaded = load(tmp_path / "model", trusted=trusted)
    np.testing.assert_array_equal(loaded.transform([*TEXTS, None]), expected)


def test_random_twin(table):
    random = PretrainedTextExtractor(table, weights=None).fit_transform(TEXTS)
    again = PretrainedTextExtractor(table, weights=None, memory=False).fit_transform(TEXTS)
    np.testing.assert_array_equal(random, again)
    assert not np.allclose(random[0], mean_of(TEXTS[0]))


def test_static_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    embeddings = np.vstack([np.full((1, 5), 9, np.float32), TABLE])
    weights = RNG.uniform(0.5, 2, len(embeddings)).astype(np.float32)
    save_file({"embeddings": embeddings, "weights": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"normalize": true}')
    extractor = PretrainedTextExtractor(f"static:{tmp_path}").fit(TEXTS)
    weighted = TABLE * weights[1:, None]
    expected = np.stack([mean_of(text, table=weighted) for text in TEXTS[:2]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(extractor.transform(TEXTS[:2]), expected, rtol=1e-5)
    save(extractor, tmp_path / "saved", standalone=True)
    (tmp_path / "tokenizer.json").unlink()
    np.testing.assert_allclose(load(tmp_path / "saved").transform(TEXTS[:2]), expected, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        PretrainedTextExtractor(f"static:{tmp_path}").fit(TEXTS)


def test_what_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file 'x\.txt' in"):
        PretrainedTextExtractor(f"vectors:{tmp_path / 'x.txt'}").fit(TEXTS)
    np.save(tmp_path / "a.npy", TABLE)
    with pytest.raises(FileNotFoundError, match=r"beside the vectors 'a\.npy' their words"):
        PretrainedTextExtractor(f"vectors:{tmp_path / 'a.npy'}").fit(TEXTS)
    (tmp_path / "a.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match=r"it has the shape \(11, 5\), for 2 words"):
        PretrainedTextExtractor(f"vectors:{tmp_path / 'a.npy'}").fit(TEXTS)
    (tmp_path / "b.txt").write_text("one 1 2\ntwo 1\n")
    with pytest.raises(ValueError, match="cannot be read as a table of vectors"):
        PretrainedTextExtractor(f"vectors:{tmp_path / 'b.txt'}").fit(TEXTS)


def test_weights_of_words_need_words(tmp_path):
    pytest.importorskip("transformers")
    folder = make_text_folder(tmp_path)
    with pytest.raises(ValueError, match=r"pooling='sif' weights the words of a table"):
        PretrainedTextExtractor(f"hf:{folder}", pooling="sif").fit(TEXTS)
