"""A disk that fails at a chosen call."""

import errno
import os

from cifar_resnet import files


class Faulty:
    """Stands in for what `write_whole` calls of the system; one call of them all, counted from 0, fails."""

    def __init__(self, monkeypatch, failing=-1, code=errno.EIO):
        self.called, self.failing, self.code = [], failing, code
        monkeypatch.setattr(files, "os", self)
        monkeypatch.setattr(files, "open", self.open_file, raising=False)

    def __getattr__(self, name):
        return getattr(os, name)

    def check(self, name):
        self.called.append(name)
        if len(self.called) - 1 == self.failing:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path, flags):
        self.check("os.open")
        return os.open(path, flags)

    def fsync(self, file):
        self.check("os.fsync")
        os.fsync(file)

    def replace(self, source, target):
        self.check("os.replace")
        os.replace(source, target)

    def open_file(self, path, mode="r", **options):
        if not str(path).endswith(".part"):
            return open(path, mode, **options)
        self.check("open")
        file, check = open(path, mode, **options), self.check  # noqa: SIM115

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, value):
                file.write(value[: len(value) // 2])
                check("write")
                file.write(value[len(value) // 2 :])

            def flush(self):
                check("flush")
                file.flush()

            def fileno(self):
                return file.fileno()

        return File()


CALLS = ["open", "write", "flush", "os.fsync", "os.replace", "os.open", "os.fsync"]  # of one whole write
CODES = [errno.ENOSPC, errno.EACCES, errno.EIO]
