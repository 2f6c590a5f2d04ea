"""Sets out what the populations came to: accuracies of all networks, statistics of populations, controls, evolution.

Data sets of scores.csv are `<n>_epochs`, what networks have learned after n epochs, `more_training`, which sets such
epochs side by side, and `evolution`. The seed of a row is the number of a training set, of which each is a repetition
of the paper's experiment and the unit that intervals are over; in `evolution` it is the seed of an evolution.
Accuracies of single networks have entries in `graph` and `replicate`.

Statistics of a population (by training set) are over one network a graph, as in the paper, and then means over
replicates; those of `baseline` and `one_graph` are over all replicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from shared.config import Stage
from shared.evaluation.scores import write_metrics, write_scores

from . import analysis, data, figures
from .baselines import CONTROLS, fit_predict
from .config import OF_GRAPHS, Params
from .evolve import load as load_evolution
from .evolve import stored_programs
from .speed import search_rates, step_times
from .symbolic.interpreter import Graph
from .train import load_graphs, results

Row = dict[str, Any]
Array = NDArray[np.float64]
# Populations whose bests stand beside each other.
COMPARED = ("baseline", "ssn", "one_graph")
# Networks below this training accuracy are counted as failures of optimization.
FITTED = 0.75
# With fewer networks than these a correlation is not worth a row.
MIN_CORRELATED = 4


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    puzzles, graphs = data.load(stage.data_dir), load_graphs(stage)
    networks = pd.DataFrame(accuracies(stage, graphs))
    rows = list(network_rows(networks))
    rows += population_rows(networks)
    rows += decomposition_rows(networks)
    rows += more_training_rows(networks)
    rows += control_rows(puzzles, sorted(set(networks.dataset[networks.population == "ssn"])))
    if stage.params.evolution is not None:
        rows += evolution_rows(stage)
    frame = pd.DataFrame(rows)
    write_scores(stage.results_dir / "scores.csv", frame)
    if stage.params.speed is not None:
        torch.set_num_threads(stage.params.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        costs = [*step_times(stage.params.speed, stage.params, graphs, device), *search_rates(stage.params.speed)]
        write_scores(stage.results_dir / "costs.csv", pd.DataFrame(costs))
    write_metrics(stage, frame, puzzles.source)
    paths = figures.draw(stage, frame, graphs)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")


def accuracies(stage: Stage[Params], graphs: Mapping[str, Graph]) -> Iterator[Row]:
    """A row a network and epoch that it was measured at: population, graph, training set, replicate, train and eval."""
    for population, settings in stage.params.populations.items():
        for member, record in results(stage, population, graphs):
            for index, epochs in enumerate(settings.epochs):
                yield {
                    "population": population,
                    "dataset": f"{epochs}_epochs",
                    "graph": member.graph,
                    "training_set": member.training_set,
                    "replicate": member.replicate,
                    "train": record["train_accuracy"][index],
                    "eval": record["eval_accuracy"][index],
                }


def network_rows(networks: pd.DataFrame) -> Iterator[Row]:
    for network in networks.itertuples():
        for metric, value in (("train_accuracy", network.train), ("eval_accuracy", network.eval)):
            row = _row(network.population, network.dataset, metric, network.training_set, value)
            yield row | {"graph": network.graph, "replicate": network.replicate}


# --- Populations ------------------------------------------------------------------------------------------------------


def population_rows(networks: pd.DataFrame) -> Iterator[Row]:
    """Statistics of every population, by training set."""
    for dataset, of_dataset in networks.groupby("dataset"):
        blocks = {
            (str(population), training_set): _blocks(str(population), of_set)
            for (population, training_set), of_set in of_dataset.groupby(["population", "training_set"])
        }
        # Bests are compared between as many networks each.
        compared = [block for (name, _), found in blocks.items() if name in COMPARED for block in found]
        smallest = min(map(len, compared), default=1)
        for (population, training_set), of_population in blocks.items():
            per_block = pd.DataFrame([statistics(block, smallest) for block in of_population])
            for metric, value in per_block.mean().items():
                yield _row(population, dataset, metric, training_set, value)
            fitted = pd.concat([block[block.train >= FITTED] for block in of_population])
            yield _row(population, dataset, "fitted_runs", training_set, len(fitted))
            if len(fitted) >= MIN_CORRELATED:
                value = analysis.correlation(fitted.train.to_numpy(), fitted["eval"].to_numpy())
                yield _row(population, dataset, "train_eval_correlation_fitted", training_set, value)
        yield from ssn_rows(str(dataset), of_dataset)


def _blocks(population: str, of_set: pd.DataFrame) -> list[pd.DataFrame]:
    """The networks that a statistic is over: those of one replicate where there are several graphs, else all."""
    return [block for _, block in of_set.groupby("replicate")] if population in OF_GRAPHS else [of_set]


def statistics(block: pd.DataFrame, count: int) -> dict[str, float]:
    """What the paper's plots show of a population; its best is that of `count` networks, of all if they are fewer."""
    train, held_out = block.train.to_numpy(), block["eval"].to_numpy()
    found = {"gap": float(train.mean() - held_out.mean())}
    if len(block) > 1:
        upper, lower = analysis.halves(train, held_out)
        found |= {
            "top_half_eval": upper,
            "bottom_half_eval": lower,
            "best_eval": analysis.expected_maximum(held_out, min(count, len(block))),
            "eval_variance": float(held_out.var(ddof=1)),
            "eval_sd": float(held_out.std(ddof=1)),
        }
    if len(block) >= MIN_CORRELATED:
        found["train_eval_correlation"] = analysis.correlation(train, held_out)
    return found


def ssn_rows(dataset: str, of_dataset: pd.DataFrame) -> Iterator[Row]:
    """What several seeds of every graph tell of population `ssn`: the graph's share, and whether choosing it lasts."""
    ssn = of_dataset[of_dataset.population == "ssn"]
    if ssn.empty or ssn.replicate.nunique() < 2:
        return
    train, held_out = cube(ssn, "train"), cube(ssn, "eval")
    for training_set in range(held_out.shape[1]):
        share = analysis.graph_share(held_out[:, training_set])
        yield _row("ssn", dataset, "graph_share", training_set, share)
        chosen, dropped = analysis.retrained(train[:, training_set], held_out[:, training_set])
        yield _row("ssn_chosen", dataset, "retrained_eval", training_set, chosen)
        yield _row("ssn_dropped", dataset, "retrained_eval", training_set, dropped)
    for training_set, value in enumerate(analysis.agreement(held_out.mean(axis=2))):
        yield _row("ssn", dataset, "graph_agreement", training_set, value)


def cube(networks: pd.DataFrame, column: str) -> Array:
    """Accuracies of a population as `[graphs, training sets, replicates]`."""
    ordered = networks.sort_values(["graph", "training_set", "replicate"])
    shape = [networks[name].nunique() for name in ("graph", "training_set", "replicate")]
    return ordered[column].to_numpy(dtype=float).reshape(shape)


def decomposition_rows(networks: pd.DataFrame) -> Iterator[Row]:
    """Variance components of evaluation accuracy over graph, training set and seed, with the ends of their intervals.

    Metrics `sd_<component>` and `share_<component>`; rows with `low` or `high` in `bound` are the ends.
    """
    ssn = networks[networks.population == "ssn"]
    for dataset, of_dataset in ssn.groupby("dataset"):
        values = cube(of_dataset, "eval")
        if min(values.shape) < 2:
            continue
        for name, component in analysis.variance_components(values).items():
            for metric, interval in ((f"sd_{name}", component.sd), (f"share_{name}", component.share)):
                row = _row("ssn", str(dataset), metric, 0, interval.estimate)
                yield row
                yield row | {"bound": "low", "value": interval.low}
                yield row | {"bound": "high", "value": interval.high}


def more_training_rows(networks: pd.DataFrame) -> Iterator[Row]:
    """Baselines after some epochs and after more, as models beside each other."""
    baselines = networks[networks.population.isin(["baseline", "baseline_long"])]
    for network in baselines.itertuples():
        model = f"{network.population}_{network.dataset}"
        row = _row(model, "more_training", "eval_accuracy", network.training_set, network.eval)
        yield row | {"replicate": network.replicate}


def control_rows(puzzles: data.Puzzles, datasets: Sequence[str]) -> Iterator[Row]:
    """The controls' accuracies; the same in every data set, for they do not know epochs."""
    label = puzzles.label[puzzles.evaluation] > 0
    for training_set in range(puzzles.training_sets):
        for name in CONTROLS:
            value = float((fit_predict(name, puzzles, training_set) == label).mean())
            for dataset in datasets:
                yield _row(name, dataset, "eval_accuracy", training_set, value)
                if name == "layout":
                    yield _row(name, dataset, "best_eval", training_set, value)


# --- Evolution --------------------------------------------------------------------------------------------------------


def evolution_rows(stage: Stage[Params]) -> Iterator[Row]:
    """Growth of the library, size of the programs, and accuracies by iteration, of every evolution."""
    settings = stage.params.evolution
    for seed in settings.seeds if settings else ():
        state = load_evolution(stage, seed)
        sizes = np.array(list(stored_programs(state)), dtype=float)
        for model, value in zip(("with_library", "without_library"), sizes.mean(axis=0), strict=True):
            yield _row(model, "evolution", "program_size", seed, value)
        for past in state.history:
            for metric in ("library_size", "library_mass", "new_graphs", "population"):
                yield _row("evolution", "evolution", metric, seed, past[metric]) | {"iteration": past["iteration"]}
            for one in past.get("trained", ()):
                # Trained by the iteration that follows the exploration.
                where = {"iteration": past["iteration"] + 1, "graph": one["id"]}
                for metric in ("train_accuracy", "eval_accuracy"):
                    yield _row("evolution", "evolution", metric, seed, one[metric]) | where


def _row(model: Any, dataset: Any, metric: Any, seed: Any, value: Any) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": int(seed), "value": float(value)}
