"""What stands between two markers of a Markdown file, and writing it anew."""

from pathlib import Path

from memory_efficient_attention_pytorch.training.files import write_atomically


def between_markers(path: Path, markers: tuple[str, str]) -> str:
    """Return the text between the markers of a Markdown file, without the empty lines around it.

    Raises:
        ValueError: the file does not have both markers once each, in order.
    """
    return _split_at_markers(path, *markers)[1].strip("\n")


def rewrite(path: Path, block: str, markers: tuple[str, str]) -> bool:
    """Put ``block`` between the markers of a Markdown file; return whether that changed it.

    Raises ValueError as ``between_markers`` does.
    """
    before, former, after = _split_at_markers(path, *markers)
    renewed = f"\n\n{block}\n\n"
    if renewed != former:
        write_atomically(path, before + renewed + after)
    return renewed != former


def _split_at_markers(path: Path, begin: str, finish: str) -> tuple[str, str, str]:
    text = path.read_text()
    if text.count(begin) != 1 or text.count(finish) != 1 or text.index(begin) > text.index(finish):
        raise ValueError(f"path: expected one line {begin!r} and after it one {finish!r} in {path}")
    start, end = text.index(begin) + len(begin), text.index(finish)
    return text[:start], text[start:end], text[end:]
