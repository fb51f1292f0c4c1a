"""Standard output and error, which may be a closed pipe, a full disk, or a console without the characters of UTF-8."""
import os
import sys
from contextlib import contextmanager, suppress


class Unfailing:
    """A text stream whose writes never raise: what cannot be shown is lost."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):    # no reader, no space, no terminal; closed
            try:
                return self.stream.write(text)
            except UnicodeEncodeError as error:
                return self.stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        discard_if_closed(self.stream)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            return self.stream.flush()
        discard_if_closed(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def unfailing_output():
    """While a script trains, no print and no progress bar ends it: not `| head`, not a `| tee` that Ctrl-C ended."""
    before, ours = (sys.stdout, sys.stderr), (Unfailing(sys.stdout), Unfailing(sys.stderr))
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        if (sys.stdout, sys.stderr) == ours:   # else another thread or a test has set its own
            sys.stdout, sys.stderr = before


def discard(stream):
    """What was written to the stream and what will be goes nowhere, or Python would complain at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def discard_if_closed(stream):
    """If the reader of a pipe has gone, it will not come back. (A full disk may have space later.)"""
    try:
        stream.flush()
    except BrokenPipeError:
        discard(stream)
    except (OSError, ValueError):
        pass


def prepare_streams():
    """Gives a script the streams that it was started without (`>&-`), and has both show "?" for what they cannot."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:               # or the next file would become standard output
        pass
    os.close(null)
    sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") if stream is None else stream
                              for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):     # a notebook's stream has no such method
            stream.reconfigure(errors="replace")
