"""A file a second time, without its bytes where that can be."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from llmtrain.files import HASH_BLOCK_BYTES, atomic_write, fsync_folder, temporary_beside


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` a hard link of `source`, or a copy on another file system. Returns whether it is a link.

    Of a symbolic link the file that it leads to is linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_symlink() and target.samefile(source):
        return True
    temporary = temporary_beside(target)
    try:
        os.link(source.resolve(), temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with open(source, "rb") as reader, atomic_write(target) as writer:
            shutil.copyfileobj(reader, writer, HASH_BLOCK_BYTES)
        return False
    temporary.replace(target)
    fsync_folder(target.parent)
    return True
