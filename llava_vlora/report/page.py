"""``report.html``: one file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.scoring import OVERALL
from .collect import Report, findings, format_p
from .heat import heat_uri, image_uri, mean_over_types, peak_over_even
from .markup import CSS, figure, table
from .plots import added_memory

_NAMES = {"llava": "LLaVA", "vlora": "VLoRA", "blind": "Blind"}


def render_page(report: Report, plots: Mapping[str, Path], images: Path) -> str:
    """The whole page.

    Args:
        report: The figures.
        plots: PNG files by name, as :mod:`llava_vlora.report.plots` makes them.
        images: Folder of the samples' images.
    """
    sections = (
        _header(report),
        _accuracy(report, plots["accuracy"]),
        _cost(report, plots["cost"]),
        _released(report, plots["released"]),
        _training(report, plots["loss"]),
        _samples(report, images),
        _details(report),
    )
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>LLaVA and VLoRA on SceneQA</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _header(report: Report) -> str:
    data, settings = report["data"], report["run"]["settings"]
    overall = {name: report["accuracy"][name][OVERALL]["share"] for name in _NAMES}
    models = report["cost"]["models"]
    tiles = [
        _tile("Accuracy", {n: f"{100 * share:.1f} %" for n, share in overall.items()}),
        _tile("Tokens the LLM reads", {n: str(m["sequence"]) for n, m in models.items()}),
        _tile("FLOPs to the first token", {n: _flops(m) for n, m in models.items()}),
        _tile("Time to the first token", {n: _first(m) for n, m in models.items()}),
    ]
    items = "".join(
        f"<li>{escape(sentence).replace(' -', ' &minus;')}</li>" for sentence in findings(report)
    )
    return (
        "<h1>LLaVA and VLoRA, trained side by side</h1>"
        f'<p class="soft">SceneQA size {escape(data["size"])}, seed {settings["seed"]}: '
        f"{data['train_images']:,} training scenes, {data['test_images']:,} held-out scenes with "
        f"{data['test_questions']:,} questions. Same trainer, data, base models and steps; the "
        "only difference is <code>--mm_projector_type</code>.</p>"
        f'<div class="tiles">{"".join(tiles)}</div><ul class="findings">{items}</ul>'
    )


def _tile(title: str, values: Mapping[str, str]) -> str:
    rows = "".join(
        f'<div><span class="{name}">{_NAMES[name]}</span>{escape(value)}</div>'
        for name, value in values.items()
    )
    return f'<div class="tile"><b>{escape(title)}</b>{rows}</div>'


def _flops(model: Mapping[str, Any]) -> str:
    return f"{model['flops']['first_token'] / 1e6:.1f} M"


def _first(model: Mapping[str, Any]) -> str:
    return f"{1e3 * model['time']['first_token']:.1f} ms"


def _accuracy(report: Report, plot: Path) -> str:
    rows = []
    for category in report["categories"]:
        cells = [_share(report["accuracy"][name][category]) for name in _NAMES]
        levels = [f"{100 * level[category]:.1f}" for level in report["baselines"].values()]
        total = str(report["accuracy"]["llava"][category]["total"])
        rows.append([escape(category), total, *cells, *levels])
    head = ["Question type", "n", *_NAMES.values(), "Chance", "Best guess<br>unseen"]
    tests = [
        [
            f"{_NAMES[pair['first']]} &minus; {_NAMES[pair['second']]}",
            _points(pair["difference"]),
            f"{_points(pair['interval']['low'])} to {_points(pair['interval']['high'])}",
            str(pair["test"]["only_first"]),
            str(pair["test"]["only_second"]),
            escape(format_p(pair["test"]["p_value"]).removeprefix("= ")),
        ]
        for pair in report["comparisons"]
    ]
    pair_head = ["Pair", "Points", "95 %", "Only first<br>right", "Only second<br>right"]
    return (
        "<h2>Accuracy</h2><p>Greedy answers, exact match with the label (case and punctuation "
        "aside). Blind is the trained LLaVA model without the image. Brackets: Wilson 95 % "
        "intervals. Best guess unseen: for each question the answer that its wording has most "
        "often in the training set.</p>"
        + figure(plot, "Accuracy by question type with 95 % intervals.")
        + table(head, rows)
        + "<p>Paired comparison on all questions. The interval resamples images, because questions "
        "about one image depend on each other; p is of the exact McNemar test, which takes "
        "questions as independent.</p>" + table([*pair_head, "p"], tests) + _pope(report)
    )


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "&minus;")


def _share(row: Mapping[str, Any]) -> str:
    low, high = 100 * row["interval"]["low"], 100 * row["interval"]["high"]
    return f"{100 * row['share']:.1f} <small>[{low:.0f}, {high:.0f}]</small>"


def _pope(report: Report) -> str:
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    rows = [
        [_NAMES[name], *(_optional(score[c]) for c in columns)]
        for name, score in report["pope"].items()
    ]
    never = [_NAMES[name] for name, score in report["pope"].items() if score["precision"] is None]
    note = (
        f" It computes no precision or recall for {', '.join(never)}: it divides by zero where no "
        "question, or none with the label yes, is answered yes."
        if never
        else ""
    )
    head = ["LLaVA's POPE scorer", "Accuracy", "Precision", "Recall", "F1", "Says yes"]
    return (
        "<p>The existence questions once more, by the POPE scorer that LLaVA ships, run as it is."
        f"{note}</p>" + table(head, rows)
    )


def _optional(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def _cost(report: Report, plot: Path) -> str:
    models, memory = report["cost"]["models"], report["memory"]
    machine = report["cost"]["machine"]

    def row(title: str, value: Any) -> list[str]:
        return [title, *(value(name, model) for name, model in models.items())]

    rows = [
        row("Tokens the language model reads (seen in the model)", lambda n, m: str(m["sequence"])),
        row("FLOPs of the vision tower", lambda n, m: _mega(m["flops"]["vision"])),
        row("FLOPs of the projector or generator", lambda n, m: _mega(m["flops"]["connector"])),
        row("FLOPs of reading the prompt", lambda n, m: _mega(m["flops"]["prefill"])),
        row("of these in low-rank paths", lambda n, m: _mega(m["flops"]["low_rank"])),
        row("FLOPs of each further token", lambda n, m: _mega(m["flops"]["decode"])),
        row("Time to the first token", lambda n, m: _time(m["time"], "first_token")),
        row("Time of each further token", lambda n, m: _time(m["time"], "per_token")),
        row("Peak memory of model and answer", lambda n, m: _mebi(added_memory(memory[n]))),
        row("Peak memory of the whole process", lambda n, m: _mebi(memory[n]["after_answer"])),
        row("Trainable parameters, pretraining", lambda n, m: _count(m, "trainable_pretrain")),
        row("Trainable parameters, fine-tuning", lambda n, m: _count(m, "trainable_finetune")),
    ]
    return (
        f"<h2>Cost of an answer</h2><p>The question &ldquo;{escape(report['cost']['question'])}"
        f"&rdquo; and its image, on {escape(machine['device'])} with {machine['threads']} "
        "thread(s), batch of one. Times are medians of turns that alternate between the models, with the fastest "
        "and the slowest in brackets. The perceptual weights are applied unmerged.</p>"
        + figure(plot, "Cost of answering one question; the FLOPs bar shows its parts.")
        + table(["", *(_NAMES[name] for name in models)], rows)
        + f'<p class="soft">FLOPs: {escape(report["cost"]["convention"])}.</p>'
    )


def _mega(value: float) -> str:
    return f"{value / 1e6:,.2f} M"


def _mebi(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _count(model: Mapping[str, Any], part: str) -> str:
    return f"{model['parameters'][part]:,}"


def _time(times: Mapping[str, Any], part: str) -> str:
    fastest, slowest = (1e3 * value for value in times[f"{part}_range"])
    return f"{1e3 * times[part]:.1f} ms <small>[{fastest:.1f}, {slowest:.1f}]</small>"


def _released(report: Report, plot: Path) -> str:
    rows = []
    for row in report["released"]["rows"]:
        totals = [row[model]["first_token"] for model in ("llava", "vlora")]
        language = [row[model]["prefill"] for model in ("llava", "vlora")]
        rows.append(
            [
                str(row["patches"]),
                *(f"{total / 1e12:.2f}" for total in totals),
                f"{totals[1] / totals[0]:.3f}",
                f"{language[1] / language[0]:.3f}",
            ]
        )
    head = ["Image patches", "LLaVA, TFLOPs", "VLoRA, TFLOPs", "Ratio", "Ratio, LLM alone"]
    return (
        "<h2>The same arithmetic at full size</h2><p>Computed, not measured: FLOPs to the first "
        "token with CLIP ViT-L/14, Vicuna 7B and VLoRA's published settings (width 512, 8 blocks, "
        f"rank 64, every 4th layer) for {report['released']['text_tokens']} text tokens. The demo's "
        "models are too small to show this saving; accuracy at full size is not tested here.</p>"
        + figure(plot, "FLOPs to the first token against the number of image patches.")
        + table(head, rows)
    )


def _training(report: Report, plot: Path) -> str:
    rows = [
        [
            f"{_NAMES[model]}, {stage}",
            str(part["loss"][-1][0]),
            f"{part['loss'][-1][1]:.3f}",
            f"{part['seconds']:.0f} s",
            f"{part['samples_per_second']:.1f}",
        ]
        for model, stages in report["training"].items()
        for stage, part in stages.items()
    ]
    parallel = report["run"]["settings"]["parallel"] > 1
    note = " The two trainings shared the machine." if parallel else ""
    return (
        "<h2>Training</h2><p>LLaVA's own trainer, both models on the same data with the same "
        f"seed.{note}</p>"
        + figure(plot, "Training loss.")
        + table(["", "Steps", "Last loss", "Time", "Samples a second"], rows)
    )


def _samples(report: Report, images: Path) -> str:
    samples = report["samples"]
    cards = "".join(_sample(row, samples["layers"], images) for row in samples["rows"])
    return (
        "<h2>Answers and where the generator looked</h2><p>Drawn by chance before any answer was "
        "known, every question type in turn. The small maps show, for each injected layer, the "
        "generator's cross-attention to the image patches: mean over blocks, heads and weight "
        "types. Dark is no attention, the brightest patch has as many times an even share as its "
        f'caption says. The generator does not see the question.</p><div class="samples">{cards}</div>'
    )


def _sample(row: Mapping[str, Any], layers: Sequence[int], images: Path) -> str:
    path = images / row["image"]
    answers = "".join(
        f'<tr><td class="{name}">{_NAMES[name]}</td>'
        f'<td class="{"yes" if row["correct"][name] else "no"}">{escape(text) or "(empty)"}</td></tr>'
        for name, text in row["answers"].items()
    )
    looks = "".join(
        f'<figure><img src="{heat_uri(path, attention)}" alt="attention">'
        f"<figcaption>layer {layer}: {peak_over_even(attention):.1f}&times;</figcaption></figure>"
        for layer, attention in zip(layers, mean_over_types(row["look"]), strict=True)
    )
    return (
        f'<div class="sample"><div><img src="{image_uri(path)}" alt="test image"><div>'
        f"<p><b>{escape(row['question'])}</b></p><table><tr><td>Label</td>"
        f"<td>{escape(row['label'])}</td></tr>{answers}</table></div></div>"
        f'<div class="looks">{looks}</div></div>'
    )


def _details(report: Report) -> str:
    run = report["run"]
    commands = "\n\n".join(f"# {name}\n{line}" for name, line in run["commands"].items())
    versions = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>"
                       for k, v in run["versions"].items())  # fmt: skip
    checks = ", ".join(
        f"{_NAMES[name]} {check['same_as_batch_of_one']} of {check['checked']}"
        for name, check in report["batch_check"].items()
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in run["seconds"].items())
    commit = escape(run["commit"] or "not a checkout")
    return (
        "<h2>How this was made</h2>"
        f"<p>Answers given in batches of prompts of equal length, without padding; repeated one by "
        f"one they are the same for: {checks}.</p><p>Wall time: {seconds}. Machine: "
        f"{escape(run['machine']['platform'])}, {run['machine']['cores']} cores. Commit {commit}."
        f"</p><table><tbody>{versions}</tbody></table>"
        f"<details><summary>Training commands</summary><pre>{escape(commands)}</pre></details>"
    )
