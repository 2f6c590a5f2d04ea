"""Scores all models on the test cases, masked modeling on volumes that it has not seen, and draws the figures.

`item` is the test case and `organ` the structure. Dice, HD95 (the larger of both directions) and ASD are those of
`shared.evaluation.segmentation`; of bladder, uterus and CTV only the largest piece counts. `p/<metric>` are two-sided
permutation tests of each model against GynBTNet over test cases (means over organs and seeds), `p_adjusted/<metric>`
the same after Benjamini and Hochberg's correction over all models and metrics together, and `friedman_p/<metric>` asks
whether all models are alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from shared.config import Stage, load_optional
from shared.data.volumes import keep_largest_component, predict_logits
from shared.evaluation.ranking import paired_permutation_test
from shared.evaluation.scores import write_metrics, write_scores
from shared.evaluation.segmentation import SegmentationScores, label_scores
from shared.evaluation.statistics import benjamini_hochberg
from shared.evaluation.tabular import friedman_test
from shared.nn.masked_modeling import patch_mask, reconstruction_loss
from shared.tracking import open_run
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from . import data, figures
from .baselines import atlas
from .config import ATLAS, BASELINES, COMPLEX, SECOND_STAGE, SIMPLE, SINGLE, Params, RealData
from .data import CaseSet, Prepared
from .model import masked_model
from .pretrain import load_masked_model, masked_volumes
from .train import load_segmenter, run_folder

Row = dict[str, Any]
Labels = NDArray[np.uint8]
METRICS = {"dice": 4, "hd95": 2, "asd": 3}  # and how many digits of them are kept
# What a model must be compared with to see what masked modeling brought.
WITHOUT_PRETRAINING = {"self_supervised": "scratch", "gynbtnet": "multi_organ"}
MASK_RATIOS = (0.6, 0.75, 0.9)
MAX_TIMED_STEPS = 3
CASES_AT_ONCE = 4


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    params, prepared = stage.params, data.load(stage.data_dir)
    load_optional("monai.inferers", "gynbtnet")  # once, not in each of the processes that are forked
    trained = list(trainings(params))
    jobs = [Job(f"{model}, {_dataset(n)}, seed {s}", score_model, (stage, model, n, s)) for model, n, s in trained]
    jobs += [Job(f"masked modeling, seed {seed}", score_reconstruction, (stage, seed)) for seed in params.seeds]
    results = run_jobs(jobs, workers=params.workers, threads=params.threads)
    rows = [row for found, _ in results for row in found]
    predictions = {
        (model, cases): segmented
        for (model, cases, seed), (_, segmented) in zip(trained, results, strict=False)
        if seed == params.seeds[0]
    }
    for cases in params.models or (None,):
        predicted = atlas_of(prepared, params, cases)
        rows += segmentation_rows(params, prepared, ATLAS, cases, 0, predicted)
    frame = pd.DataFrame(rows)
    main = _dataset(params.main_cases)
    derived = [*gains(frame, main), *organ_rows(frame, main), *significance(frame)]
    frame = pd.concat([frame, pd.DataFrame(derived)], ignore_index=True)
    write_scores(stage.results_dir / "scores.csv", frame)
    write_scores(stage.results_dir / "costs.csv", pd.DataFrame([*training_costs(stage), *masking_costs(stage)]))
    write_metrics(stage, frame, prepared.source)
    paths = figures.draw(stage, frame, prepared, predictions)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


def trainings(params: Params) -> Iterator[tuple[str, int | None, int]]:
    """Model, number of cases (None: of the second stage, on the real CT) and seed of all that is tested."""
    for seed in params.seeds:
        if isinstance(params.data, RealData):
            yield from ((model, None, seed) for model in SECOND_STAGE.values())
        for cases, models in params.models.items():
            yield from ((model, cases, seed) for model in models)


# --- Segmentation -----------------------------------------------------------------------------------------------------


def score_model(
    stage: Stage[Params], model: str, cases: int | None, seed: int, report: Report
) -> tuple[list[Row], Labels]:
    """Rows of scores.csv of one trained network, and its segmentations of the test cases, [cases, X, Y, Z]."""
    prepared = data.load(stage.data_dir)
    network = load_segmenter(stage, prepared, _task(model, cases), model, seed, cases)
    predicted = segment(stage.params, prepared, network, prepared.read("test"), cases is not None)
    report(0.5, "distances")
    return segmentation_rows(stage.params, prepared, model, cases, seed, predicted), predicted


def segment(
    params: Params, prepared: Prepared, network: torch.nn.Module, cases: CaseSet, brachytherapy: bool
) -> Labels:
    """Labels [cases, X, Y, Z] by sliding windows; the largest piece of what is one piece."""
    single = [1 + params.classes("brachytherapy").index(name) for name in SINGLE] if brachytherapy else []
    device = next(network.parameters()).device
    segmented = []
    for first in range(0, len(cases.images), CASES_AT_ONCE):
        images = [prepared.normalization.apply(image) for image in cases.images[first : first + CASES_AT_ONCE]]
        volumes = torch.from_numpy(np.stack(images))[:, None].to(device)
        # Convolutions of a single window on one thread take a path that is several times as slow.
        logits = predict_logits(
            network, volumes, params.patch, mirror_axes=params.mirrored_axes, batch_size=CASES_AT_ONCE
        )
        labels = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        segmented += [keep_largest_component(part, single) for part in labels]
    return np.stack(segmented)


def segmentation_rows(
    params: Params, prepared: Prepared, model: str, cases: int | None, seed: int, predicted: Labels
) -> list[Row]:
    """Scores by test case and organ, and in how many of them one side alone is empty."""
    tested = prepared.read("test")
    assert tested.labels is not None
    names = params.classes("multi_organ" if cases is None else "brachytherapy")
    classes = dict(enumerate(names, start=1))
    rows, empty = [], 0
    for item, (labels, target) in enumerate(zip(predicted, tested.labels, strict=True)):
        scores: Mapping[str, SegmentationScores] = label_scores(labels, target, classes, prepared.spacing)
        # The real CT has one test case: its seeds are the units, and no item is named.
        which = {} if cases is None else {"item": item}
        for organ, score in scores.items():
            empty += score.empty
            for metric, digits in METRICS.items():
                value = round(getattr(score, metric), digits)
                rows.append(_row(model, _dataset(cases), metric, seed, value) | {"organ": organ} | which)
    return [*rows, _row(model, _dataset(cases), "empty", seed, empty)]


def atlas_of(prepared: Prepared, params: Params, cases: int | None) -> Labels:
    """The atlas of the training labels as the segmentation of every test case, [cases, X, Y, Z]."""
    tested = prepared.read("test")
    if cases is None:
        # Slices are what the parts of the real CT have in common: each one counts as a case.
        training_set = prepared.read("multi_organ")
        assert training_set.labels is not None
        slices = CaseSet(training_set.images, np.moveaxis(training_set.labels[0], 2, 0)[..., None])
        predicted = atlas(slices, 1 + len(params.classes("multi_organ")))
    else:
        training_set = prepared.read("brachytherapy").first(cases)
        predicted = atlas(training_set, 1 + len(params.classes("brachytherapy")))
    return np.broadcast_to(predicted, tested.images.shape)


# --- Reconstruction ---------------------------------------------------------------------------------------------------


def score_reconstruction(stage: Stage[Params], seed: int, report: Report) -> tuple[list[Row], None]:
    """Losses on volumes that were held out; with the first seed also those of predicting each patch's mean."""
    params, prepared = stage.params, data.load(stage.data_dir)
    model = load_masked_model(stage, seed)
    dataset = "masked_real_ct" if isinstance(params.data, RealData) else "masked_phantoms"
    rows = []
    for item, (volume, mask) in enumerate(masked_volumes(params, prepared)):
        device = next(model.parameters()).device
        volume, mask = volume.to(device), mask.to(device)
        with torch.no_grad():
            loss = reconstruction_loss(model(volume, mask), volume, mask)
            of_mean = reconstruction_loss(torch.zeros_like(volume), volume, mask)
        rows.append(
            _row("masked_modeling", dataset, "reconstruction_loss", seed, round(loss.item(), 4)) | {"item": item}
        )
        if seed == params.seeds[0]:
            value = round(of_mean.item(), 4)
            rows.append(_row("patch_mean", dataset, "reconstruction_loss", 0, value) | {"item": item})
    return rows, None


# --- What follows from the scores -------------------------------------------------------------------------------------


def gains(frame: pd.DataFrame, main: str) -> Iterator[Row]:
    """Gains of Dice by seed and test case: from masked modeling at complex and simple borders, and by cases."""
    rows = frame[frame.metric.eq("dice") & frame.dataset.str.startswith("cases_")]
    if rows.empty:
        return
    table = rows.pivot_table(index=["dataset", "seed", "item", "organ"], columns="model", values="value")
    for model, without in WITHOUT_PRETRAINING.items():
        if {model, without} <= set(table.columns):
            gain = (table[model] - table[without]).dropna().xs(main).unstack("organ")
            for kind, organs in (("complex", COMPLEX), ("simple", SIMPLE)):
                for (seed, item), value in gain[list(organs)].mean(axis=1).items():
                    found = _row(f"{model}_{kind}", "gain_of_pretraining", "gain", seed, round(value, 4))
                    yield found | {"item": int(item)}
    if {"gynbtnet", "scratch"} <= set(table.columns):
        gain = (table["gynbtnet"] - table["scratch"]).dropna().groupby(["dataset", "seed", "item"]).mean()
        for (dataset, seed, item), value in gain.items():
            found = _row("gynbtnet", "gain_by_cases", "gain", seed, round(value, 4))
            yield found | {"item": int(item), "cases": int(dataset.removeprefix("cases_"))}


def organ_rows(frame: pd.DataFrame, main: str) -> Iterator[Row]:
    """GynBTNet's Dice once more, the organ in the place of the model, to compare organs."""
    chosen = frame.metric.eq("dice") & frame.model.eq("gynbtnet") & frame.dataset.eq(main)
    for row in frame[chosen].itertuples():
        yield _row(row.organ, "organs_of_gynbtnet", "dice", row.seed, row.value) | {"item": int(row.item)}


def significance(frame: pd.DataFrame) -> Iterator[Row]:
    """Friedman's test over all models, then permutation tests of each against GynBTNet, adjusted together."""
    for dataset, rows in frame[frame.dataset.str.startswith("cases_")].groupby("dataset"):
        found: list[tuple[str, str, float]] = []
        for metric in METRICS:
            values = rows[rows.metric.eq(metric) & rows.model.ne(ATLAS)]
            table = values.pivot_table(index="item", columns="model", values="value")
            if table.shape[1] >= 3:
                yield _row("all", dataset, f"friedman_p/{metric}", 0, friedman_test(table.to_numpy()).p_value)
            if "gynbtnet" in table:
                others = table.columns.drop("gynbtnet")
                found += [
                    (m, metric, paired_permutation_test((table["gynbtnet"] - table[m]).to_numpy())) for m in others
                ]
        if found:
            adjusted = benjamini_hochberg([p for _, _, p in found])
            for (model, metric, p), after in zip(found, adjusted, strict=True):
                yield _row(model, dataset, f"p/{metric}", 0, p)
                yield _row(model, dataset, f"p_adjusted/{metric}", 0, after)


# --- Costs ------------------------------------------------------------------------------------------------------------


def training_costs(stage: Stage[Params]) -> Iterator[Row]:
    """Seconds that each training took; folders of other profiles' trainings, which may lie about, are not looked at."""
    folders = {run_folder(stage, _task(model, n), model, seed, n) for model, n, seed in trainings(stage.params)}
    for seed in stage.params.seeds:
        folders.add(stage.runs_dir / "pretrain" / f"seed{seed}")
        folders |= {run_folder(stage, "multi_organ", variant, seed) for variant in SECOND_STAGE.values()}
    for folder in folders:
        *names, seed_folder = folder.relative_to(stage.runs_dir).parts
        seconds = json.loads((folder / "finished.json").read_text(encoding="utf-8"))["seconds"]
        yield _row("/".join(names), "training", "seconds", int(seed_folder.removeprefix("seed")), seconds)


def masking_costs(stage: Stage[Params]) -> Iterator[Row]:
    """Seconds of a step of masked modeling, masked dense layers against submanifold kernels, by share masked."""
    params = stage.params
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    volume = torch.randn(params.pretrain.batch_size, 1, *params.patch, device=device)
    for sparse in (False, True):
        model = masked_model(params.network.model_copy(update={"sparse": sparse}), 0).to(device)
        for ratio in MASK_RATIOS:
            seconds = []
            for _ in range(MAX_TIMED_STEPS):
                mask = patch_mask(len(volume), model.patches_of(volume), ratio, device=device)
                _wait(device)
                started = time.perf_counter()
                reconstruction_loss(model(volume, mask), volume, mask).backward()
                _wait(device)
                seconds.append(time.perf_counter() - started)
            name = "sparse" if sparse else "masked_dense"
            yield _row(name, "masked_modeling_step", "seconds", 0, min(seconds)) | {"mask_ratio": ratio}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's mean test scores to the run that trained it, as `test/dice` and so on."""
    means = frame[frame.metric.isin(METRICS)].groupby(["dataset", "model", "seed", "metric"]).value.mean()
    for model, cases, seed in trainings(stage.params):
        record = run_folder(stage, _task(model, cases), model, seed, cases) / "run.json"
        if record.is_file():
            values = means[_dataset(cases), model, seed]
            with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                epochs = stage.params.multi_organ.epochs if cases is None else stage.params.training(model).epochs
                run.log({f"test/{metric}": float(value) for metric, value in values.items()}, step=epochs)


def _task(model: str, cases: int | None) -> str:
    if cases is None:
        return "multi_organ"
    return "baselines" if model in BASELINES else "brachytherapy"


def _dataset(cases: int | None) -> str:
    return "real_ct" if cases is None else f"cases_{cases}"


def _row(model: str, dataset: str, metric: str, seed: int, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": int(seed), "value": float(value)}
