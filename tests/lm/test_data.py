"""Corpora, vocabulary and batches."""

import hashlib
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnfast import files
from rnnfast.lm import Batches, UserError, Vocab, data, load_corpus, random_batches, sequential_batches

CACHE_FOLDER = files.cache_folder  # the tests' own is another
needs_time_machine = pytest.mark.skipif(not os.environ.get("RNNFAST_DATA"), reason="RNNFAST_DATA is not set")


@needs_time_machine
def test_time_machine_is_d2ls() -> None:
    corpus = load_corpus("timemachine")
    assert len(corpus.train) == 170_580
    assert corpus.vocab.idx_to_token[:8] == ["<unk>", " ", "e", "t", "a", "i", "n", "o"]
    assert len(corpus.vocab) == 28
    lines = data.clean_lines(data.time_machine())
    assert len(lines) == 3221
    assert lines[0] == "the time machine by h g wells"
    assert "".join(corpus.vocab.to_tokens(corpus.train[:29])) == lines[0]


@needs_time_machine
def test_time_machine_words_and_max_tokens() -> None:
    words = load_corpus("timemachine", tokens="word")
    assert len(words.train) == 32_775
    assert words.vocab.idx_to_token[:4] == ["<unk>", "the", "i", "and"]
    assert len(load_corpus("timemachine", max_tokens=10_000).train) == 10_000


def test_cleaning_keeps_letters_only() -> None:
    assert data.clean_lines("The Time-Machine, 1895!\n\n  É  a ") == ["the time machine", "", "a"]
    assert data.clean_lines("a\r\nb\rc\nd") == ["a", "b", "c", "d"]
    for character in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029":  # ends of lines for str.splitlines only
        assert data.clean_lines(f"one{character}two") == ["one two"]
    assert data.tokenize("Ab c\nD") == "ab cd"
    assert data.tokenize("Ab, c\nD", "word") == ["ab", "c", "d"]
    assert data.tokenize("Ab, c\nD", raw=True) == "Ab, c\nD"
    assert data.tokenize("Ab, c\nD", "word", raw=True) == ["Ab,", "c", "D"]


def test_builtin_text_is_prose() -> None:
    text = data.builtin_text()
    assert len(text) > 50_000
    assert "::=" not in text
    assert ">>>" not in text
    corpus = load_corpus("pydoc")
    assert len(corpus.vocab) == 28
    assert corpus.vocab.idx_to_token[1:3] == [" ", "e"]


def test_no_name_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    assert load_corpus().name == "pydoc"
    assert "built-in text" in capsys.readouterr().err


def test_a_corpus_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_corpus("timemachine")


@pytest.mark.parametrize("name", [None, "timemachine"])
def test_wrong_text_in_the_data_folder_is_an_error(
    name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "timemachine.txt").write_text("not the time machine")
    monkeypatch.setenv("RNNFAST_DATA", str(tmp_path))
    with pytest.raises(UserError, match="sha1"):
        load_corpus(name)


@pytest.mark.parametrize("name", [None, "timemachine"])
def test_a_data_folder_that_is_none_is_an_error(
    name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "timemachine.txt").touch()
    for folder in ("timemachine.txt", "nothing"):
        monkeypatch.setenv("RNNFAST_DATA", str(tmp_path / folder))
        with pytest.raises(UserError, match=rf"RNNFAST_DATA is .*{folder}, which is no folder: set it to"):
            load_corpus(name)


@pytest.mark.parametrize("variable", ["RNNFAST_DATA", "RNNFAST_CACHE"])
def test_a_home_that_is_none_in_a_variable_is_an_error(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    monkeypatch.setenv(variable, "~nosuch/texts")
    with pytest.raises(UserError, match=f"{variable}: ~nosuch/texts begins with a home folder that cannot be found"):
        load_corpus()


def test_without_a_home_there_is_no_cache_but_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "cache_folder", CACHE_FOLDER)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("~nosuch").expanduser()))
    for variable in ("RNNFAST_DATA", "RNNFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert load_corpus().name == "pydoc"
    assert "built-in text" in capsys.readouterr().err
    monkeypatch.setattr(data, "_download", lambda url: b"x")
    monkeypatch.setattr(data, "TIME_MACHINE_SHA1", hashlib.sha1(b"x").hexdigest())
    assert data.time_machine() == "x"


def test_download_is_checked_kept_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = b"a small time machine\n" * 9
    calls: list[str] = []

    def download(url: str) -> bytes:
        calls.append(url)
        return text

    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    monkeypatch.setattr(data, "_download", download)
    with pytest.raises(data.TextUnavailable, match="sha1 differs"):
        data.time_machine()
    assert not (tmp_path / "cache" / "timemachine.txt").exists()
    monkeypatch.setattr(data, "TIME_MACHINE_SHA1", hashlib.sha1(text).hexdigest())
    assert data.time_machine() == text.decode()
    assert data.time_machine() == text.decode()
    assert len(calls) == 2  # the second time it came from the cache
    (tmp_path / "cache" / "timemachine.txt").write_bytes(text[:50])
    assert data.time_machine() == text.decode()
    assert len(calls) == 3  # a damaged cache is replaced


def test_download_reads_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.urllib.request, "urlopen", urllib.request.build_opener().open)
    assert data._download("data:text/plain,The%20Time%20Machine") == b"The Time Machine"
    with pytest.raises(data.TextUnavailable, match="set RNNFAST_DATA"):
        data._download("file:///nowhere")


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(data, "_download", lambda url: b"x")
    monkeypatch.setattr(data, "TIME_MACHINE_SHA1", hashlib.sha1(b"x").hexdigest())
    assert data.time_machine() == "x"
    assert "not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\x7fELF\0\0\1", "binary"),
        ("text".encode("utf-32"), "is UTF-32: convert it with iconv -f utf-32"),
        ("text".encode("utf-16"), "is UTF-16: convert it with iconv -f utf-16"),
        ("語文".encode("utf-16"), "is UTF-16: convert it with iconv -f utf-16"),
        (b"\xfe\xff" + "語文".encode("utf-16-be"), "is UTF-16: convert it with iconv -f utf-16"),
        ("text".encode("utf-16-le"), "or UTF-16"),
        ("\ufeff".encode(), "empty"),
        ("\u00a0\n".encode(), "empty"),
        ("café".encode("latin1"), "not UTF-8"),
        (b"1234 5678", "no letters"),
    ],
)
def test_bad_files_get_one_clear_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("tokens", ["char", "word"])
@pytest.mark.parametrize("blank", ["", "\n", "\ufeff", "\u00a0 \u00a0"])
def test_a_blank_text_is_empty_however_it_is_read(blank: str, tokens: Any, raw: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(blank, encoding="utf-8")
    with pytest.raises(UserError, match="is empty, or all spaces: name a text file"):
        load_corpus(str(tmp_path / "text.txt"), tokens=tokens, raw=raw)


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(UserError, match="--corpus must be the name of a text or a file"):
            load_corpus(name)
    with pytest.raises(UserError, match="begins with a home folder that cannot be found"):
        load_corpus("~nosuch/text.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "words"}, "--tokens must be of type"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1, or -1 for all, not 0"),
        ({"validation": 2.0}, r"--validation must be in \[0, 1\), not 2.0"),
        ({"validation": -0.5}, r"--validation must be in \[0, 1\), not -0.5"),
    ],
)
def test_settings_are_refused_as_on_the_command_line(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus("pydoc", **settings)


def test_a_vocabulary_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcabca")
    with pytest.raises(UserError, match=r"no token .* is seen 9 times: give a --min-freq of at most 3"):
        load_corpus(str(tmp_path / "text.txt"), min_freq=9)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="directory"):
        load_corpus(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="there is no device without an end")
def test_a_device_is_no_text() -> None:
    with pytest.raises(UserError, match="/dev/zero is a device, which may have no end: name a text file"):
        load_corpus("/dev/zero")


def test_user_file_with_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("\ufeffHé!".encode())
    corpus = load_corpus(str(tmp_path / "text.txt"), raw=True)
    assert corpus.vocab.to_tokens(corpus.train) == ["H", "é", "!"]


def test_validation_is_the_end_of_the_text() -> None:
    whole = load_corpus("pydoc", max_tokens=1000)
    split = load_corpus("pydoc", max_tokens=1000, validation=0.1)
    assert (len(split.train), len(split.validation)) == (900, 100)
    assert torch.equal(torch.cat([split.train, split.validation]), whole.train)
    assert len(whole.validation) == 0


def test_vocab_orders_by_frequency_and_first_appearance() -> None:
    vocab = Vocab(["b", "a", "c", "a", "d", "d"], min_freq=1, reserved_tokens=["<pad>"])
    assert vocab.idx_to_token == ["<unk>", "<pad>", "a", "d", "b", "c"]
    assert vocab.token_freqs[:2] == [("a", 2), ("d", 2)]
    assert vocab[["a", "zebra"]] == [2, 0]
    assert vocab["<pad>"] == 1
    assert vocab.to_tokens([2, 0]) == ["a", "<unk>"]
    assert vocab.to_tokens(torch.tensor([3])) == ["d"]
    assert len(Vocab(["b", "a", "a"], min_freq=2)) == 2
    assert Vocab([["a", "b"], [], ["b"]]).idx_to_token == ["<unk>", "b", "a"]
    assert Vocab([[], ["x"]]).idx_to_token == ["<unk>", "x"]
    assert Vocab().idx_to_token == ["<unk>"]
    assert Vocab.from_list(vocab.idx_to_token).token_to_idx == vocab.token_to_idx
    for wrong in ([], ["a", "b"], ["a", "<unk>"], ["<unk>", "a", "a"]):
        with pytest.raises(ValueError, match="each once"):
            Vocab.from_list(wrong)


def test_vocab_of_tuples_is_the_chapters_of_bigrams_and_trigrams() -> None:
    corpus = ["the", "time", "machine", "the", "time", "traveller", "the"]
    bigrams = Vocab([pair for pair in zip(corpus[:-1], corpus[1:])])  # noqa: B905, C416, RUF007 - the chapter's
    assert bigrams.token_freqs[:2] == [(("the", "time"), 2), (("time", "machine"), 1)]
    trigrams = Vocab([triple for triple in zip(corpus[:-2], corpus[1:-1], corpus[2:])])  # noqa: B905, C416
    assert trigrams.token_freqs[0] == (("the", "time", "machine"), 1)
    assert len(trigrams) == 6
    assert bigrams["the", "time"] == 1
    assert bigrams[[("the", "time"), ("time", "machine"), ("a", "b")]] == [1, 2, [0, 0]]
    assert bigrams.encode([("the", "time"), ("a", "b")]) == [1, 0]
    assert bigrams.to_tokens([1, 0]) == [("the", "time"), "<unk>"]
    words = Vocab(corpus)
    assert words["the", "time"] == words[["the", "time"]] == [1, 2]
    assert words[["the"], ["time"]] == [[1], [2]]


def test_sequential_batches_go_on_where_the_last_ended() -> None:
    x, y = sequential_batches(torch.arange(35), batch_size=2, num_steps=5, offset=3)
    assert x.shape == (3, 5, 2)
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert x[0, :, 0].tolist() == [3, 4, 5, 6, 7]
    assert x[1, :, 0].tolist() == [8, 9, 10, 11, 12]
    assert x[0, 0, 1] == 3 + 15  # the second row starts at half of the 31 usable tokens


def test_random_batches_cover_every_piece_once() -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    x, y = random_batches(torch.arange(35), batch_size=2, num_steps=5, offset=1, order=order)
    assert x.shape == (3, 5, 2)
    assert x[0].is_contiguous()
    assert torch.equal(y, x + 1)
    assert sorted(x[:, 0].flatten().tolist()) == [1, 6, 11, 16, 21, 26]
    assert x[:, 0].flatten().tolist() == (1 + 5 * order).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_draw_anew_and_reproducibly(shuffle: bool) -> None:
    def epochs() -> list[torch.Tensor]:
        batches = Batches(torch.arange(1000), 4, 7, shuffle, torch.Generator().manual_seed(1))
        return [batches.epoch()[0] for _ in range(3)]

    first, again = epochs(), epochs()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_batches_in_text_order_begin_at_any_of_the_first_tokens() -> None:
    """As in d2l's `seq_data_iter_sequential`, from 0 up to the length of a batch itself."""
    batches = Batches(torch.arange(100), 4, 3, False, torch.Generator().manual_seed(1))
    assert {int(batches.epoch()[0][0, 0, 0]) for _ in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize("shuffle", [False, True])
def test_shortest_text_has_a_batch_behind_every_offset(shuffle: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = Batches(torch.arange(4 * 7 + 7 + 1), 4, 7, shuffle, generator)
    assert all(len(batches.epoch()[0]) == 1 for _ in range(50))
    assert len(batches) == 1
    with pytest.raises(UserError, match=r"35 tokens.*needs 36"):
        Batches(torch.arange(35), 4, 7, shuffle, generator)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the cache that tests use
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/xdg")
        patch.delenv("RNNFAST_CACHE", raising=False)
        assert files.cache_folder() == Path("/xdg/rnnfast")
        patch.setenv("RNNFAST_CACHE", "/mine")
        assert files.cache_folder() == Path("/mine")
