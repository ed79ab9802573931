"""A file a second time, without its bytes where that can be."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from llmtrain.files import temporary_beside


def link_or_copy(source: Path, target: Path) -> bool:
    """Make `target` a hard link of `source`, or a copy on another file system. Returns whether it is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return True
    temporary = temporary_beside(target)
    is_link = True
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        is_link = False
        try:
            shutil.copyfile(source, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(target)
    return is_link
