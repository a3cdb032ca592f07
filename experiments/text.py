# SPDX-License-Identifier: MIT
"""Language modelling on bytes. Prints bits per byte of held-out files after 1 to 16 loops, those of
zlib and lzma, and a sample. PASS: better than lzma, and 2 to 16 loops within 0.05 bits.

python -m experiments.text --data PATH
"""

import lzma
import math
import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from mythos import MythosConfig, RecurrentDepthTransformer, expect
from train_tiny import Task, logits_per_loop, make_parser, run


class Text(Task):
    """Next-byte prediction on files, some of which are held out whole. A token is a byte."""

    name, steps, batch_size, lr_scale = "text", 1000, 16, 3.0
    context, held_out = 256, 10  # bytes that the model sees; every 10th file is held out,
    test_bytes = 150_000  # and at most so many of their bytes are scored: more take too long;
    most_of_one = None  # of each file so many, from its middle; None: an equal share
    test_loops = (1, 2, 4, 8, 16)

    def __init__(self, data: Path | None = None) -> None:
        pieces = read_pieces(data)
        held_out = pieces[:: self.held_out]
        most = self.most_of_one or self.test_bytes // max(1, len(held_out))
        parts = [piece[max(0, len(piece) - most) // 2 :][:most] for piece in held_out]
        self.test = b"".join(parts)[: self.test_bytes]
        train = b"".join(p for i, p in enumerate(pieces) if i % self.held_out)
        got, least = (len(train), len(self.test)), self.context + 2
        expect(min(got) >= least, f"--data {data}", got, f"{least} bytes to train on, and to test")
        self.train_data = torch.frombuffer(bytearray(train), dtype=torch.uint8)
        self.about = f"{got[0]:,} bytes to train on, {got[1]:,} to test"
        self.name = f"text-{data.resolve().name}" if data else "text"
        self.data_crc = zlib.crc32(self.test + train)  # resuming with others would mix two runs

    def config(self, attention_type: str) -> MythosConfig:
        """Small enough to see 20 bytes for each of its parameters; dense, so that it uses them."""
        small = dict(d_model=64, n_heads=2, kv_lora_rank=32, d_ff=128, num_experts=0)
        more = dict(recurrent_layers=2, max_loop_iters=2, max_seq_len=512)
        return MythosConfig(attention_type=attention_type, **small, **more)

    def draw_loops(self, generator: torch.Generator, frontier: int) -> int:
        """1, 2 or 3; in every tenth step 4 to 16, which teaches the state to settle. Always takes
        two random numbers: other loop counts (experiments/compare.py) see the same batches."""
        share = torch.rand((), generator=generator).item() / 0.1
        few = int(torch.randint(1, 4, (), generator=generator))
        return 4 + int(share * 13) if share < 1 else few

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
                nats = nn.functional.cross_entropy(logits[L].mT, part[:, 1:], reduction="sum")
                bits[L] += nats.item() / math.log(2) / windows[:, 1:].numel()
        return bits

    def evaluate(self, model: RecurrentDepthTransformer) -> dict:
        """Held-out bits per byte for each loop count, two compressors, a sample, and the checks."""
        C, N, bits, others = self.context, len(self.test), self.measure(model, self.test_loops), {}
        for size, how in ((N, "all at once"), (C, f"{C} bytes at a time")):
            parts = [self.test[i : i + size] for i in range(0, N, size)]
            others[f"zlib -9, {how}"] = 8 * sum(len(zlib.compress(p, 9)) for p in parts) / N
            packed = [lzma.compress(p, lzma.FORMAT_ALONE) for p in parts]
            others[f"lzma, {how}"] = 8 * sum(map(len, packed)) / N
        rng = torch.Generator(model.head.weight.device).manual_seed(0)
        prompt = torch.tensor([list(b"def ")], device=rng.device)
        ids = model.generate(prompt, C, temperature=0.9, top_p=0.9, generator=rng)
        settled, least = [b for L, b in bits.items() if L >= 2], others["lzma, all at once"]
        spread = max(settled) - min(settled)
        checks = [("bits per byte, best loop count", min(bits.values()), "<=", least)]
        checks += [("largest difference from 2 to 16 loops", spread, "<=", 0.05)]
        checks = checks if self.name == "text" else []  # other data may be anything
        sample = readable(bytes(ids[0].tolist()))
        return {"bits_per_byte": bits, "compressors": others, "sample": sample, "checks": checks}

    def describe(self, results: dict) -> str:
        """A table of what `evaluate` measured, and the sample."""
        rows = results["bits_per_byte"] | results["compressors"]
        text = f"Bits per byte of {len(self.test):,} held-out bytes, by loops, and of compressors\n"
        text += "".join(f"{name:>28} {value:6.3f}\n" for name, value in rows.items())
        return text + f"\nA sample (temperature 0.9, top_p 0.9):\n{results['sample']}\n"


def readable(data: bytes) -> str:
    """Bytes as text. What would move a terminal's cursor, or cannot be decoded, becomes a dot."""
    text = data.decode(errors="replace").replace("\ufffd", "·")
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def read_pieces(data: Path | None) -> list[bytes]:
    """The files of a folder, or the library's; if there are too few to hold some out whole, 20
    pieces of their text. Hidden files are left out, and results of runs."""
    root, skip = data, r"/\..|-(mla|gqa)-seed\d"
    if data is None:  # leave out tests, what pip installed, generated tables, all much alike
        root = Path(sysconfig.get_paths()["stdlib"])
        skip += "|/(tests?|idle_test|site-packages|dist-packages|encodings)/"
    files = sorted(root.rglob("*" if data else "*.py")) if root.is_dir() else [root]
    keep = [p for p in files if not re.search(skip, "/" + p.relative_to(root).as_posix())]
    texts = [p.read_bytes() for p in keep if p.is_file()]
    text = b"".join(texts)
    size = 1 + len(text) // 20
    return texts if len(texts) >= 40 else [text[i : i + size] for i in range(0, len(text), size)]


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Train Mythos on text.", Text)
    parser.add_argument("--data", help="a file or folder (default: Python's library)")

    def make_task(args) -> Text:
        try:
            data = None if args.data is None else Path(args.data)
            ok = data is None or args.data and data.exists()  # Path("") would be this folder
            expect(ok, "--data", args.data, "a file or folder")
            return Text(data)
        except (ValueError, OSError) as error:
            parser.error(str(error))

    return run(parser, arguments, make_task)


if __name__ == "__main__":
    raise SystemExit(main())
