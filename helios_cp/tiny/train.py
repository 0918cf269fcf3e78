"""Trains the embedded models, a stage at a time: `python -m helios_cp.tiny.train STAGE [STAGE ...] --output DIR`.

Every stage goes on where it was stopped, and starts from what the stages before it left in DIR.
"""

from __future__ import annotations

import argparse
import sys

from helios_cp.config.arguments import OneLineParser, number, whole_number
from helios_cp.config.imports import quiet_imports
from helios_cp.config.paths import user_path
from helios_cp.tiny.options import NEEDS, Options

STAGES = """stages, in order:
  text          the text encoder, on captions
  encoder       the VAE's encoder, the principal components of pictures
  decoder       the VAE's decoder, on short clips, their borders, and noisy latents
  latents       clips encoded by the VAE, to disk
  judge         the classifier that says what a video shows
  mid           the transformer of Mid: flow matching on a pyramid
  base          the transformer of Base, from that of Mid
  trajectories  guided trajectories of Mid, to disk
  distilled     the transformer of Distilled, from that of Mid, by regression
  matched       the same, by distribution matching as well
  sheet         videos of the models that are there, as contact sheets, and what the classifier says of them
  embed         the weights as the package carries them"""


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="helios_cp.tiny.train",
        usage="python -m helios_cp.tiny.train STAGE [STAGE ...] --output DIR [flag ...]",
        description="Train the embedded models on rendered clips. A stage that was stopped goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=STAGES,
    )
    add = parser.add_argument
    add("stages", nargs="+", choices=(*NEEDS, "all"), metavar="STAGE", help="some of the stages below, or all")
    add("--output", type=user_path, required=True, metavar="DIR", help="the folder that all stages share")
    add(
        "--steps",
        type=whole_number,
        metavar="N",
        help="steps, scenes, clips, trajectories or prompts of the stages named",
    )
    add("--init", type=user_path, metavar="FILE", help="weights (.safetensors) that the stage named starts from")
    add("--seed", type=whole_number, default=0, metavar="N", help="of all random numbers (default: 0)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=whole_number, default=1, metavar="N", help="threads of the CPU (default: 1)")
    add("--height", type=whole_number, default=64, metavar="PIXELS", help="of the clips to encode (default: 64)")
    add("--width", type=whole_number, default=128, metavar="PIXELS", help="of the clips to encode (default: 128)")
    add("--batch-scale", type=number, default=1.0, metavar="X", help="multiplies batches, for a GPU (default: 1)")
    add("--rate", type=number, default=1.0, metavar="X", help="multiplies learning rates (default: 1)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0 when all stages are done; a call that cannot work ends with 2 before anything starts."""
    parser = build_parser()
    given = parser.parse_args(argv)
    stages = tuple(NEEDS) if "all" in given.stages else tuple(given.stages)
    options = Options(
        given.output,
        given.init,
        given.steps,
        given.seed,
        given.device,
        given.height,
        given.width,
        given.batch_scale,
        given.rate,
    )
    _check(parser, options, stages, given.threads)
    quiet_imports()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; leave the flag out to train on the CPU")
    torch.set_num_threads(given.threads)
    from helios_cp.tiny.stages import run_stage

    for stage in stages:
        print(f"{stage}:", flush=True)
        run_stage(stage, options)
    return 0


def _check(parser: OneLineParser, options: Options, stages: tuple[str, ...], threads: int) -> None:
    """Refuse what cannot work, in one line."""
    for flag, value in (("--steps", options.steps), ("--threads", threads)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: give at least 1")
    for flag, factor in (("--batch-scale", options.scale), ("--rate", options.rate)):
        if not factor > 0:
            parser.error(f"{flag} {factor}: give more than 0")
    for flag, size in (("--height", options.height), ("--width", options.width)):
        if size < 64 or size % 64:
            parser.error(f"{flag} {size}: give a multiple of 64")
    if options.init is not None and (len(stages) > 1 or not options.init.is_file()):
        parser.error(f"--init {options.init}: give a file that exists, and one stage, to which it belongs")
    made = {stage for stage in NEEDS if options.has(stage)}
    for stage in stages:
        missing = [need for need in NEEDS[stage] if need not in made]
        if missing:
            parser.error(f"{stage}: {', '.join(missing)} must be in {options.output} first; run {' '.join(missing)}")
        made.add(stage)


if __name__ == "__main__":
    sys.exit(main())
