"""The stages of training, each from the folder that all of them share and back into it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from helios_cp.files.whole_files import write_json, write_tensors
from helios_cp.tiny import components, decoder, distill, flow, forward, initial, judge, matching, sample, text, vae
from helios_cp.tiny.embed import write_embedded
from helios_cp.tiny.judging import test_prompts, verdict
from helios_cp.tiny.latents import Clips, write_clips
from helios_cp.tiny.loop import Learner, Rates, average_of, run
from helios_cp.tiny.options import Options
from helios_cp.tiny.sheet import write_sheet

VARIANTS = ("mid", "distilled", "base")


def run_stage(name: str, options: Options) -> None:
    """Run a stage of `NEEDS` to its end, from what others left in the folder."""
    STAGES[name](options)


def _text(options: Options) -> None:
    torch.manual_seed(options.seed)
    reader = text.Reader()
    _train(
        options, "text", reader, text.is_matrix, lambda generator: text.training_loss(reader, generator), Rates(0.01)
    )
    print("held-out captions:", _percent(text.accuracy(load_reader(options))), flush=True)


def _encoder(options: Options) -> None:
    made = vae.make_vae()
    found, deviations = components.principal_components(
        vae.CONFIG["z_dim"], seed=options.seed, scenes=options.amount_of("encoder")
    )
    components.set_encoder(made, found, components.scales_of(deviations))
    weights = {
        f"average.{name}": parameter.detach().contiguous()
        for name, parameter in made.named_parameters()
        if name.startswith(("encoder.", "quant_conv."))
    }
    write_tensors(options.state("encoder"), weights)


def _decoder(options: Options) -> None:
    torch.manual_seed(options.seed)
    made = _averaged(vae.make_vae(), options.state("encoder"), options.device)
    vae.to_channels_last(made)
    made.requires_grad_(False)
    for part in (made.post_quant_conv, made.decoder):
        part.requires_grad_(True)
    _train(options, "decoder", made, vae.is_matrix, lambda generator: decoder.training_loss(made, generator), Rates())


def _latents(options: Options) -> None:
    write_clips(
        load_vae(options),
        options.output / "latents",
        options.amount_of("latents"),
        seed=options.seed,
        height=options.height,
        width=options.width,
    )


def _judge(options: Options) -> None:
    torch.manual_seed(options.seed)
    made = judge.Judge()
    _train(options, "judge", made, judge.is_matrix, lambda generator: judge.training_loss(made, generator), Rates())
    accuracy = judge.accuracy(load_judge(options))
    write_json(options.output / "judge" / "accuracy.json", accuracy)
    print("rendered pairs of frames:", _percent(accuracy), flush=True)


def _mid(options: Options) -> None:
    _train_flow(options, "mid", None)


def _base(options: Options) -> None:
    _train_flow(options, "base", "mid")


def _trajectories(options: Options) -> None:
    teacher, encoder = load_transformer(options, "mid"), load_reader(options).encoder
    folder, clips = options.output / "trajectories", Clips(options.output / "latents")
    distill.write_trajectories(teacher, encoder, clips, folder, options.amount_of("trajectories"), seed=options.seed)


def _distilled(options: Options) -> None:
    student, encoder = load_transformer(options, "mid"), load_reader(options).encoder
    clips = Clips(options.output / "latents")
    pairs = distill.Trajectories.read(options.output / "trajectories")
    loss = distill.make_loss(student, clips, pairs, encoder, options.scale)
    _train(options, "distilled", student, forward.is_matrix, loss, Rates(0.006, 6e-4))


def _matched(options: Options) -> None:
    teacher, encoder = load_transformer(options, "mid"), load_reader(options).encoder
    pair = matching.Pair(_regressed(options), load_transformer(options, "mid"))
    clips = Clips(options.output / "latents")
    pairs = distill.Trajectories.read(options.output / "trajectories")
    regression = distill.make_loss(pair.student, clips, pairs, encoder, options.scale)
    loss = matching.make_loss(pair, teacher.requires_grad_(False), clips, encoder, regression, options.scale)
    _train(options, "matched", pair, matching.is_matrix, loss, Rates(0.003, 3e-4))


def _sheet(options: Options) -> None:
    """Contact sheets of the models that there are, and what the classifier says of them, as JSON."""
    encoder, codec, classifier = load_reader(options).encoder, load_vae(options), load_judge(options)
    clips = Clips(options.output / "latents")
    prompts = test_prompts(options.steps or 24)
    for variant in VARIANTS:
        if not options.has(variant):
            continue
        model = load_transformer(options, variant)
        size = tuple(clips.chunks.shape[-2:])
        texts = [prompt for prompt, _ in prompts]
        chunks = sample.sample(model, encoder, variant, texts, chunks=2, size=size, seed=options.seed)
        videos = list(np.concatenate([sample.decode(codec, clips.mean, clips.std, each) for each in chunks], 1))
        write_sheet(videos[:12], 8, options.output / f"{variant}.png")
        report = verdict(classifier, videos, prompts)
        write_json(options.output / f"{variant}.json", report)
        print(f"{variant}:", json.dumps(report["accuracy"]), flush=True)


def _embed(options: Options) -> None:
    clips = Clips(options.output / "latents")
    transformers = {name: load_transformer(options, name) for name in VARIANTS if options.has(name)}
    write_embedded(
        options.output / "embed",
        load_reader(options).encoder,
        load_vae(options),
        clips.mean,
        clips.std,
        transformers,
        load_judge(options),
    )


def load_reader(options: Options) -> text.Reader:
    return _averaged(text.Reader(), options.state("text"), options.device)


def load_vae(options: Options):
    made = _averaged(vae.make_vae(), options.state("encoder"), options.device)
    if options.has("decoder"):
        _averaged(made, options.state("decoder"), options.device)
    vae.to_channels_last(made)
    return made


def load_judge(options: Options) -> judge.Judge:
    return _averaged(judge.Judge(), options.state("judge"), options.device)


def load_transformer(options: Options, variant: str):
    """A model as far as it is trained: Distilled by matching, where that has run."""
    if variant == "distilled" and options.has("matched"):
        pair = matching.Pair(initial.make_transformer(), initial.make_transformer())
        return _averaged(pair, options.state("matched"), options.device).student
    return _averaged(initial.make_transformer(), options.state(variant), options.device)


def _regressed(options: Options):
    """Distilled as regression left it."""
    return _averaged(initial.make_transformer(), options.state("distilled"), options.device)


def _train_flow(options: Options, variant: str, source: str | None) -> None:
    torch.manual_seed(options.seed)
    model = load_transformer(options, source) if source else initial.make_transformer()
    model.to(options.device)
    encoder, clips = load_reader(options).encoder, Clips(options.output / "latents")
    loss = flow.make_loss(variant, model, clips, encoder, options.scale)
    _train(options, variant, model, forward.is_matrix, loss, Rates())


def _train(options: Options, stage: str, module: nn.Module, is_matrix, loss, rates: Rates) -> None:
    if options.init is not None and not options.state(stage).exists():
        weights = {name: value.float() for name, value in load_file(options.init).items()}
        module.load_state_dict(weights)
    rates = Rates(options.rate * rates.matrices, options.rate * rates.others, rates.fall)
    learner = Learner(module.to(options.device), is_matrix, rates)
    run(learner, loss, options.state(stage), steps=options.amount_of(stage), seed=options.seed)


def _averaged(module: nn.Module, state: Path, device: str):
    """The module with the moving average of its weights, for use."""
    with torch.no_grad():
        parameters = dict(module.named_parameters())
        for name, value in average_of(state).items():
            parameters[name].copy_(value)
    return module.to(device).eval()


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{key} {100 * value:.1f} %" for key, value in shares.items())


STAGES = {
    "text": _text,
    "encoder": _encoder,
    "decoder": _decoder,
    "latents": _latents,
    "judge": _judge,
    "mid": _mid,
    "base": _base,
    "trajectories": _trajectories,
    "distilled": _distilled,
    "matched": _matched,
    "sheet": _sheet,
    "embed": _embed,
}
