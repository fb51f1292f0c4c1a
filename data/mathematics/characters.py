"""Characters as tokens: padding, start, end and the 95 printable characters of ASCII (" " is token 3, "~" token 97)."""
import hashlib

import torch

from data.mathematics.problems import LONGEST_ANSWER, LONGEST_QUESTION

PAD, START, END = 0, 1, 2
VOCAB_SIZE = 3 + 95
TO_TOKENS = bytes(max(0, code - 29) for code in range(256))


def tokens(pairs):
    """-> questions (n, 160) and answers (n, 32), uint8, with padding at the end. Answers are between START and END."""
    def table(rows, width):
        return torch.frombuffer(bytearray(b"".join(row.ljust(width, b"\0") for row in rows)),
                                dtype=torch.uint8).view(-1, width)

    coded = [[text.encode("ascii").translate(TO_TOKENS) for text in column] for column in zip(*pairs)]
    answers = [bytes([START]) + answer + bytes([END]) for answer in coded[1]]
    return table(coded[0], LONGEST_QUESTION), table(answers, LONGEST_ANSWER + 2)


def text(row):
    """The text of a row of tokens, up to END."""
    row = row.tolist()
    row = row[:row.index(END)] if END in row else row
    return "".join(chr(token + 29) for token in row if token > END)


def batch(problems, rows):
    """Questions (B, S), decoder inputs (B, T), targets (B, T): the answers, shifted by one token. int64.

    problems: what tokens() returns; rows: indices (B,). S and T are the lengths of the longest of these rows.
    """
    questions, answers = (table[rows].long() for table in problems)
    questions, answers = (table[:, :(table != PAD).sum(1).max()] for table in (questions, answers))
    return questions, answers[:, :-1], answers[:, 1:]


def digest(*sets):
    """SHA-256 of sets of problems, each what tokens() returns, in hex."""
    return hashlib.sha256(b"".join(table.numpy().tobytes() for problems in sets for table in problems)).hexdigest()
