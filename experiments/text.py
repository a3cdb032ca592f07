# SPDX-License-Identifier: MIT
"""Language modelling on bytes, with the trainer of train_tiny.py.

    python -m experiments.text                  the source files of Python's own library
    python -m experiments.text --data PATH      any file or folder

Every step draws a loop count. The report gives bits per byte on held-out files after 1 to 16 loops,
beside zlib and lzma, and a sample. PASS: better than lzma, and 2, 4, 8 and 16 loops within 0.05
bits.
"""

import lzma
import math
import sys
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos import MythosConfig, RecurrentDepthTransformer, expect
from train_tiny import Task, logits_per_loop, make_parser, run


class Text(Task):
    """Next-byte prediction on files, some of which are held out whole. A token is a byte."""

    name, example, steps, batch_size, lr_scale = "text", "def ", 1000, 16, 3.0
    context = 256  # bytes that the model sees
    held_out = 10  # every 10th file is held out,
    test_bytes = 150_000  # and at most so many of their bytes are scored: more take too long;
    most_of_one = None  # of each file so many, from its middle; None: an equal share, or else one
    # large table could be half of the test
    test_loops = (1, 2, 4, 8, 16)
    few_loops, most_loops, deep_share = 3, 16, 0.1  # see `draw_loops`

    def __init__(self, data: Path | None = None) -> None:
        pieces, self.default_data = read_pieces(data), data is None
        held_out = pieces[:: self.held_out]
        most = self.most_of_one or self.test_bytes // max(1, len(held_out))
        parts = [piece[max(0, len(piece) - most) // 2 :][:most] for piece in held_out]
        test = b"".join(parts)[: self.test_bytes]
        train = b"".join(p for i, p in enumerate(pieces) if i % self.held_out)
        got, least = (len(train), len(test)), self.context + 2
        expect(min(got) >= least, "--data", got, f"{least} bytes or more to train and to test")
        self.test, self.train_data = test, torch.frombuffer(bytearray(train), dtype=torch.uint8)
        source = data.resolve().name if data else "the source files of Python's own library"
        self.about = f"{source}: {len(train):,} bytes to train on, {len(test):,} to test"
        self.name = f"text-{source}" if data else "text"
        self.data_crc = zlib.crc32(test + train)  # resuming with other files would mix two runs

    def config(self, attention_type: str) -> MythosConfig:
        """Small enough to see 20 bytes for each of its parameters; dense, so that it uses them."""
        heads = dict(attention_type=attention_type, n_heads=2, kv_lora_rank=32)
        layers = dict(recurrent_layers=2, d_ff=128, num_experts=0, max_loop_iters=2)
        return MythosConfig(d_model=64, max_seq_len=512, **heads, **layers)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """1, 2 or 3; in every tenth step 4 to 16, which teaches the state to settle.

        Each step takes two random numbers, whatever comes out: the comparison's arms with other
        loop counts take as many, and see the same batches.
        """
        share = torch.rand((), generator=generator).item() / self.deep_share
        few = int(torch.randint(1, self.few_loops + 1, (), generator=generator))
        more = int(share * (self.most_loops - self.few_loops))
        return self.few_loops + 1 + more if share < 1 else few

    def batch(self, generator: torch.Generator, frontier: int) -> tuple[Tensor, Tensor, int]:
        """tokens and targets, (N, context) each and one byte apart, and a number of loops."""
        places = len(self.train_data) - self.context
        starts = torch.randint(places, (self.batch_size, 1), generator=generator)
        window = self.train_data[starts + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:], self.draw_loops(generator, frontier)

    def test_set(self) -> Tensor:
        """The held-out bytes, (S, context + 1); rows overlap by a byte; a tail is left out."""
        data = torch.frombuffer(bytearray(self.test), dtype=torch.uint8).long()
        return data.unfold(0, self.context + 1, self.context)

    def measure(self, model: RecurrentDepthTransformer, loops: list[int]) -> dict[int, float]:
        """Held-out bits per byte after each of `loops` loops."""
        windows, bits = self.test_set(), dict.fromkeys(loops, 0.0)
        for part in windows.to(model.head.weight.device).split(32):
            logits, _ = logits_per_loop(model, part[:, :-1], loops)
            for L in loops:
                nats = F.cross_entropy(logits[L].mT.float(), part[:, 1:], reduction="sum").item()
                bits[L] += nats / math.log(2) / windows[:, 1:].numel()
        return bits

    def evaluate(self, model: RecurrentDepthTransformer) -> dict:
        """Held-out bits per byte for each loop count, two compressors, a sample, and the checks."""
        C, device = self.context, model.head.weight.device
        bits, others = self.measure(model, self.test_loops), {}

        def packed(compress: Callable, size: int, **options) -> float:
            parts = [self.test[i : i + size] for i in range(0, len(self.test), size)]
            return 8 * sum(len(compress(part, **options)) for part in parts) / len(self.test)

        for size, given in ((len(self.test), "all at once"), (C, f"{C} bytes at a time")):
            others[f"zlib -9, {given}"] = packed(zlib.compress, size, level=9)
            others[f"lzma, {given}"] = packed(lzma.compress, size, format=lzma.FORMAT_ALONE)
        rng = torch.Generator(device).manual_seed(0)
        prompt = torch.tensor([list(b"def ")], device=device)
        ids = model.generate(prompt, C, temperature=0.9, top_p=0.9, generator=rng)
        best, settled = min(bits.values()), [b for L, b in bits.items() if L >= 2]
        checks = [
            ("bits per byte, best loop count", best, "<=", others["lzma, all at once"]),
            ("largest difference from 2 to 16 loops", max(settled) - min(settled), "<=", 0.05),
        ]
        sample = readable(bytes(ids[0].tolist()))
        checks = checks if self.default_data else []  # other data may be anything
        return {"bits_per_byte": bits, "compressors": others, "sample": sample, "checks": checks}

    def describe(self, results: dict) -> str:
        """A table of what `evaluate` measured, and the sample."""
        bits, others = results["bits_per_byte"], results["compressors"]
        lines = [f"Bits per byte of {len(self.test):,} held-out bytes, none trained on"]
        ours = {f"Mythos, {L} loop{'s' * (L > 1)}": b for L, b in bits.items()}
        for name, value in (ours | others).items():
            lines.append(f"{name:>28} {value:6.3f}")
        lines.append(f"\nA sample (temperature 0.9, top_p 0.9):\n{results['sample']}\n")
        return "\n".join(lines)


def readable(data: bytes) -> str:
    """Bytes as text. What would move a terminal's cursor, or cannot be decoded, becomes a dot."""
    text = data.decode(errors="replace").replace("\ufffd", "·")
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def read_pieces(data: Path | None) -> list[bytes]:
    """The source files of the standard library, or the files of a folder, hidden ones left out. If
    there are too few to hold some out whole, or for a single file, 20 pieces of their text."""
    root = data or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*" if data else "*.py")) if root.is_dir() else [root]
    # Not from the library: tests, what pip installed, generated tables that repeat each other.
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
    parts = [p.relative_to(root).parts if root.is_dir() else () for p in files]
    keep = [not (any(x[0] == "." for x in q) or (not data and skip & {*q})) for q in parts]
    texts = [p.read_bytes() for p, kept in zip(files, keep, strict=True) if kept and not p.is_dir()]
    if len(texts) >= 40:
        return texts
    text = b"".join(texts)
    size = 1 + len(text) // 20
    return [text[i : i + size] for i in range(0, len(text), size)]


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Train Mythos on text.", Text)
    about = "a file or folder (default: Python's own library)"
    parser.add_argument("--data", type=Path, help=about)

    def make_task(args) -> Text:
        try:
            return Text(args.data)
        except (ValueError, OSError) as error:
            parser.error(str(error))

    return run(parser, arguments, make_task)


if __name__ == "__main__":
    sys.exit(main())
