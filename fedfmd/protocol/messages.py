"""What travels between the server and its nodes as Flower messages: questions, instructions and replies.

One message per node and round carries the plans of all clients that the node hosts; one reply brings back their
weighted mean, each array with the number of images behind it, and, per client, one entry in every list of metrics.
A second message has nodes test the new model: clients on images that they hold out, workers of a simulation each on a
part of the run's own. It brings back their scores alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import Field

from fedfmd.data import ImageFormat
from fedfmd.flower_compat import to_array, to_numpy
from fedfmd.protocol.compression import Scale
from fedfmd.protocol.parsing import (
    MAX_WHOLE,
    Measure,
    Seconds,
    Text,
    Weight,
    Whole,
    parse,
    record_of,
    rows_of,
)
from fedfmd.protocol.state import Arrays
from fedfmd.training import BatchTest
from fedfmd.version import __version__

ARRAYS, CONFIG, METRICS, WEIGHTS, SCALES, REST = "arrays", "config", "metrics", "weights", "scales", "rest"
TEST, VALIDATION = "test", "validation"
IMAGES, VERSION, REASON = "images", "version", "reason"
MAX_PROFILE = 64 * 1024
"""Characters of an edge device's profile: ten times what a calibration of all operators writes."""
WEIGHT = "num-examples"
BY_ATTENTION = -1

# Tensors made of received arrays share the message's memory as well; nothing here writes to them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


@dataclass(frozen=True)
class Assignment:
    """What one client is asked to do.

    Attributes:
        client: who is asked.
        steps: batches of local SGD.
        batch_size: images per batch.
        kernels: how many kernels of each bank it trains and sends; the others stay frozen.
        first_kernel: the first of these kernels, the others following in a circle; BY_ATTENTION: the client
            takes those that its images use most, in each layer.
    """

    client: int
    steps: int
    batch_size: int
    kernels: int
    first_kernel: int = 0


@dataclass(frozen=True)
class Instruction:
    """A node's part of a round.

    Attributes:
        round, lr, temperature: of all its clients.
        assignments: its clients' work.
        run: a name of the run, under which clients keep what they need in later rounds; "" if nothing is kept.
        images: what an edge device's own images must be like; None for workers, which have the run's data set.
        part, parts: which of so many parts of the run's test and validation images it tests the model on; none of 0.
    """

    round: int
    lr: float
    temperature: float
    assignments: tuple[Assignment, ...]
    run: str = ""
    images: ImageFormat | None = None
    part: int = 0
    parts: int = 0


SCALARS = tuple(f.name for f in fields(Instruction) if f.name not in ("assignments", "images"))


@dataclass(frozen=True)
class ClientResult:
    """What became of one client: `images` is the size of its shard, `examples` the images processed.

    An empty `reason` means that the update was sent; loss (the one that was minimised) and accuracy are those met while
    training, on augmented images and with weights that change from step to step. Kernel
    entropy (H(π)/ln K) and attentions are means over dynamic layers and the images of the last local steps, NaN
    where the operator has no such attention. `latency_s` is an edge device's measured time of inference per image,
    NaN in a simulation.
    """

    client: Whole
    images: Whole
    steps: Whole
    examples: Whole
    loss: Measure
    accuracy: Measure
    wall_s: Seconds
    reason: Text = ""
    kernel_entropy: Measure = math.nan
    input_attention: Measure = math.nan
    output_attention: Measure = math.nan
    latency_s: Seconds = math.nan

    @property
    def ok(self) -> bool:
        """Whether the client's update is part of the reply."""
        return not self.reason


@dataclass(frozen=True)
class ClientScore:
    """How a model does on the images that a client held out, by cross entropy and accuracy; NaN without such images.

    Attributes:
        client: whose images they are.
        test_loss, test_accuracy: of the global model.
        personal_test_loss, personal_test_accuracy: of the same with the client's own layers; NaN where it has none.
        reason: why there is no score; "" if nothing failed.
    """

    client: Whole
    test_loss: Measure = math.nan
    test_accuracy: Measure = math.nan
    personal_test_loss: Measure = math.nan
    personal_test_accuracy: Measure = math.nan
    reason: Text = ""


@dataclass(frozen=True)
class Hosted:
    """A node's answer to the question what it hosts.

    Attributes:
        client: the client that an edge device is; -1: a worker, which hosts any.
        rank, nodes: a worker's place among how many.
        device, profile: name of an edge device's profile, and the text of its own one; "" without.
        images: how many an edge device has to train on.
        error: why the node can't take part; "" if it can.
    """

    client: Annotated[int, Field(strict=True, ge=-1, le=MAX_WHOLE)] = -1
    rank: Whole = 0
    nodes: Whole = 0
    device: Text = ""
    profile: Annotated[str, Field(strict=True, max_length=MAX_PROFILE)] = ""
    images: Whole = 0
    error: Text = ""


@dataclass(frozen=True)
class Reply:
    """A node's answer: each array's mean over the clients that trained it, weighted by their images.

    `weights` holds the images behind each array; arrays that nobody trained are left out, and all of them if
    no client succeeded. A single client's arrays may be rounded, with `scales` (see
    `fedfmd.protocol.compression.Upload`). With several clients, `rest` holds what makes their mean exact (see
    `fedfmd.protocol.averaging.ExactMean`).
    """

    arrays: Arrays
    results: tuple[ClientResult, ...]
    weights: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    rest: Arrays = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """Images of all clients that succeeded."""
        return sum(result.images for result in self.results if result.ok)


@dataclass(frozen=True)
class Scores:
    """A node's answer to the message that has it test the model.

    Attributes:
        clients: the scores of its clients.
        test, validation: what became of its part of the run's test and validation images, by batch.
    """

    clients: Sequence[ClientScore] = ()
    test: Sequence[BatchTest] = ()
    validation: Sequence[BatchTest] = ()


Row = TypeVar("Row", Assignment, BatchTest, ClientResult, ClientScore)


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Wrap arrays for Flower, keeping 0-dim shapes and dtypes."""
    return ArrayRecord({name: to_array(np.asarray(array, order="C")) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> Arrays:
    """Unwrap Flower's arrays. They can't be written to, as they share the message's memory.

    Raises:
        ValueError: an array's content is damaged.
    """
    return {name: to_numpy(array) for name, array in record.items()}


def write_question(images: ImageFormat) -> RecordDict:
    """Pack what a node must know to say whether it can take part, as `read_question` unpacks it."""
    return RecordDict({CONFIG: ConfigRecord({VERSION: __version__}), IMAGES: _format_record(images)})


def read_question(content: RecordDict) -> tuple[str, ImageFormat]:
    """Return the server's version of fedfmd, and what an edge device's images must be like."""
    records = content.config_records
    return str(records[CONFIG][VERSION]), ImageFormat.from_lists(records[IMAGES])


def write_hosted(hosted: Hosted) -> RecordDict:
    """Pack a node's answer to the question."""
    return RecordDict({CONFIG: ConfigRecord({**vars(hosted)})})


def read_hosted(content: RecordDict) -> Hosted:
    """Unpack a node's answer to the question.

    Raises:
        ValueError: it is none.
    """
    hosted: Hosted = parse(Hosted, dict(record_of(content, CONFIG, ConfigRecord)), "its answer")
    return hosted


def write_instruction(instruction: Instruction, arrays: ArrayRecord) -> RecordDict:
    """Pack a node's part of a round; `arrays` (the global state) may be shared between messages."""
    scalars = {name: getattr(instruction, name) for name in SCALARS}
    columns = _columns(instruction.assignments, Assignment)
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(scalars | columns)})
    if instruction.images:
        content[IMAGES] = _format_record(instruction.images)
    return content


def read_instruction(content: RecordDict) -> tuple[Instruction, Arrays]:
    """Unpack a node's part of a round and the global arrays."""
    config = content.config_records[CONFIG]
    scalars: dict[str, Any] = {name: config[name] for name in SCALARS}
    images = ImageFormat.from_lists(content[IMAGES]) if IMAGES in content else None
    instruction = Instruction(assignments=tuple(rows_of(config, Assignment)), images=images, **scalars)
    return instruction, from_record(content.array_records[ARRAYS])


def write_reply(reply: Reply) -> RecordDict:
    """Pack a node's answer: arrays and their weights, one list per metric, and the reasons of failures."""
    columns = _columns(reply.results, ClientResult)
    reasons = ConfigRecord({REASON: columns.pop(REASON)})
    return RecordDict(
        {
            ARRAYS: to_record(reply.arrays),
            WEIGHTS: MetricRecord({**reply.weights}),
            SCALES: MetricRecord({**reply.scales}),
            REST: to_record(reply.rest),
            METRICS: MetricRecord({WEIGHT: reply.weight, **columns}),
            CONFIG: reasons,
        }
    )


def read_reply(content: RecordDict) -> Reply:
    """Unpack a node's answer. Its arrays share the message's memory, and are as large as that is.

    Raises:
        ValueError: a record is missing or another one, a value is not of its type, an array's content is damaged.
    """
    metrics, config = record_of(content, METRICS, MetricRecord), record_of(content, CONFIG, ConfigRecord)
    results = tuple(rows_of({**metrics, **config}, ClientResult))
    weights = parse(
        dict[str, Weight], dict(record_of(content, WEIGHTS, MetricRecord)), f"the record {WEIGHTS}"
    )
    scales = parse(dict[str, Scale], dict(record_of(content, SCALES, MetricRecord)), f"the record {SCALES}")
    arrays, rest = (from_record(record_of(content, name, ArrayRecord)) for name in (ARRAYS, REST))
    return Reply(arrays, results, weights, scales, rest)


def write_scores(scores: Scores) -> RecordDict:
    """Pack a node's answer to the message that has it test the model: one list per metric, and the reasons."""
    columns = _columns(scores.clients, ClientScore)
    reasons = ConfigRecord({REASON: columns.pop(REASON)})
    tests = {
        name: MetricRecord(_columns(rows, BatchTest))
        for name, rows in ((TEST, scores.test), (VALIDATION, scores.validation))
    }
    return RecordDict({METRICS: MetricRecord(columns), CONFIG: reasons, **tests})


def read_scores(content: RecordDict) -> Scores:
    """Unpack the scores of a node.

    Raises:
        ValueError: a record is missing or another one, or a value is not of its type.
    """
    metrics, config = record_of(content, METRICS, MetricRecord), record_of(content, CONFIG, ConfigRecord)
    tests = (rows_of(dict(record_of(content, name, MetricRecord)), BatchTest) for name in (TEST, VALIDATION))
    return Scores(tuple(rows_of({**metrics, **config}, ClientScore)), *map(tuple, tests))


def _format_record(images: ImageFormat) -> ConfigRecord:
    """Tuples as lists, since records hold those."""
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in vars(images).items()})


def _columns(rows: Sequence[Row], cls: type[Row]) -> dict[str, Any]:
    """One list per field, since records hold flat lists only."""
    return {field.name: [getattr(row, field.name) for row in rows] for field in fields(cls)}
