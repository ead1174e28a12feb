"""Small files that are whole or not there."""

import pathlib


def write_whole(path: pathlib.Path, content: str | bytes, mode: int = 0o666) -> None:
    """Writes `content` beside `path` and renames: dying in between leaves what was there before.

    Args:
      path: the file; its directory exists.
      content: text, or bytes as they are.
      mode: permissions of the file from its creation on (less the umask).
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=mode)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
