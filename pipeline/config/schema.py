"""The schema of a config: what a run is, section by section, with units and the meaning of zero beside each key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


class ConfigError(Exception):
    """A configuration that cannot run: the message names field, value, rule and way out."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Which run this is. Its directory is dir/id."""

    id: str = ""  # "" = made from recipe, data and the time; an existing one resumes that run
    dir: str = "runs"
    stalled_starts: int = 5  # starts in a row that failed and got no further, before the next is refused; 0 = never
    recipe: str = ""  # the choices on the three axes, filled in when composed
    data: str = ""
    cluster: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. All but name, init and dropout apply to our own only; to the mlp the activation and the gain."""

    name: str = "bn_inception"  # bn_inception, inception, bn_mlp, mlp, or a torchvision classifier
    init: str = (
        ""  # file of weights to begin from: of a run, an export with norms, Cadene's or torchvision's; "" = random
    )
    init_digest: str = ""  # of that file, filled in when the run starts
    width: float = 1.0  # factor on all channels
    stem: str = "separable"  # separable and dense are 7x7/2; small is 3x3/1, for images of 16 to 64 pixels
    activation: str = "relu"  # relu or sigmoid
    dropout: float | None = None  # before the last layer; null = the model's own rate
    response_norm: bool = False  # local response normalization in the stem
    auxiliary_head: bool = False
    literal_fig5: bool = False  # 128 instead of 96 channels in two projections, as printed
    count_padding: bool = False  # average pools divide by 9 at the edges, too, as weights that circulate need
    zero_gamma: bool = False  # torchvision's residual networks alone: the last gamma of each branch begins at 0
    initial_gain: float = 1.0  # factor on the standard deviation of initial weights: of convolutions, or all of the mlp
    per_activation: int = 0  # last modules of bn_inception that normalize each activation on its own: 1 = 5b, 2 = 5a
    # and 5b; 0 = none. It binds the network to data.image_size


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which ranks share batch statistics, and how population statistics are kept."""

    group_size: int | str = 0  # ranks that share statistics; 0 = all, 1 = each its own, node = those of a node
    group_images: int = 0  # images that share statistics, at most: group_size is chosen for it by the number of ranks,
    # so that 128 stay 128 on 64 ranks or 256; 0 = by group_size
    momentum: float = 0.1  # weight of the new batch (torch's sense); torchvision's networks keep their own, and eps
    eps: float = 1e-3
    precise_images: int = 8192  # training images for population statistics before a validation; 0 = running average
    precise_form: str = "batches"  # mean of their variances (Algorithm 2), or aggregate: one variance of all values
    compare: bool = False  # score each validation with running averages, too; what it computes then takes twice as long
    frozen: str = ""  # statistics: those that were loaded serve in training, too, and are never estimated; all: nor are
    # gamma and beta trained; "" = neither


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The packed images, and how many make up a batch."""

    root: str = ""  # directory or http(s), s3 or gs URL of shards
    train: str = ""  # brace pattern or glob of the training shards below root; "" = by dataset.json, or by their names
    val: str = ""  # the same of the validation shards
    source: str = ""  # packed into root on first use where root is absent; "" = never
    num_classes: int = 0  # 0 = as many as the data set names
    image_size: int = 224  # pixels a side, training and evaluation
    global_batch_size: int = 256  # images an optimizer step, over all ranks
    micro_batch_size: int = 0  # images a rank holds at once; 0 = its whole share; less accumulates gradients
    window: int = 0  # shards shuffled together; 0 = all
    cache: str = ""  # directory for remote and staged shards, and indexes of read-only roots; "" = ~/.cache/pipeline.
    # May name variables that are set on the nodes alone: $SLURM_TMPDIR/pipeline
    cache_gb: float = 0.0  # limit on shards kept there on a node, in 1e9 bytes; 0 = none
    stage: bool = False  # copy the shards of a directory, too, to data.cache, each once a node, before they are read
    bad_samples: float = 1e-4  # fraction of an epoch's images that may be unreadable and replaced; more stop the run
    evaluation_crop: float = 0.875  # fraction of the shorter side that evaluation sees
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of pixels in 0..1
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    decoder: str = ""  # of JPEGs: regions or whole; "" = regions where that is installed, fixed at the run's start
    digest: str = ""  # of the data set, filled in when the run starts

    @property
    def location(self) -> tuple[str, str, str, str, int, bool]:
        """Where the data set lies: root, train, val, cache, the cache's limit in bytes, and whether it is staged."""
        return self.root, self.train, self.val, self.cache, round(self.cache_gb * 1e9), self.stage


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied."""

    area_min: float = 0.08  # smallest crop, fraction of the image's area; 1 = the whole image
    flip: bool = True
    photometric: str = "full"  # full, reduced or none
    operations: int = 0  # RandAugment: operations an image, behind the crop; 0 = none
    magnitude: float = 9.0  # of these operations, 0 to 10
    magnitude_spread: float = 0.5  # standard deviation of an operation's own magnitude
    mixup: float = 0.0  # alpha of the Beta(alpha, alpha) share of two images' pixels; 0 = none
    cutmix: float = 0.0  # alpha of the share of a box of one image in another; 0 = none. Both: half the images each
    first_size: float = 1.0  # side in the first epoch, as a fraction of data.image_size; 1 = that from the first on
    growth_steps: int = 3  # in which images grow to it
    growth_epochs: float = 0.0  # until they have


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become steps. The rate is stated for rate_batch_size images and scales with the global batch."""

    name: str = "sgd"  # sgd; or for large batches, with a step in proportion to each weight's norm, lars or lamb
    rate: float = 0.0015
    rate_batch_size: int = 32  # images
    momentum: float = 0.9  # of lamb the first beta
    second_momentum: float = 0.999  # the second beta, of lamb alone
    nesterov: bool = False  # look ahead along the momentum; sgd and lars
    trust_coefficient: float = 0.001  # of lars: a step is this part of a weight's norm, times the rate
    trust_clip: bool = False  # the norms may lower a step and never raise it; lars and lamb
    weight_decay: float = 2e-4  # on weights of convolutions and linear layers; torch's sense, half the square


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Rate over time: a linear warm-up, and a fall at every step."""

    form: str = "exponential"  # from the first step on; cosine and polynomial begin behind the warm-up
    decay_factor: float = 0.96  # exponential
    decay_epochs: float = 8.0  # epochs in which the rate falls by decay_factor
    epochs: float = 0.0  # cosine, polynomial: length, warm-up included; 0 = trainer.max_epochs as the run begins, fixed
    # then: a later change of that moves no rate
    power: float = 2.0  # polynomial: of the part that is left
    final_factor: float = 0.0  # cosine, polynomial: of the rate, at the end and behind it
    warmup_epochs: float = 0.0  # to the rate of the global batch
    warmup_factor: float = 0.0  # of that rate, with which the warm-up begins; 0 = with `rate` itself, unscaled


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """The exponential average of the weights, which is validated and chosen by beside the trained ones."""

    decay: float = 0.0  # what the average keeps of itself at an update, less in the first ones; 0 = no average
    every_steps: int = 1  # optimizer steps between updates
    start_epochs: float = 0.0  # until which the average is the weights themselves


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy."""

    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3  # of the auxiliary head's loss, where there is one


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how exactly, and how often to look."""

    max_epochs: int = 90
    max_steps: int = -1  # optimizer steps; -1 = max_epochs alone decides
    precision: str = "32"  # 32, bf16 (mixed) or 64
    deterministic: bool = True  # same ranks, device type, versions and threads give the same bits
    threads: int = 0  # CPU threads of a process; 0 = cores / processes of the node, fixed at the run's start
    validate_every_epochs: int = 1  # 0 = only at the end
    checkpoint_every_steps: int = 0  # besides one after each epoch; 0 = none besides
    checkpoint_every_minutes: float = 10.0  # since the last one, by the leading rank's clock; 0 = never for that
    keep_checkpoints: int = 2  # newest ones kept, besides the best
    on_nan: str = "stop"  # a loss that is no number, or a spike: stop, or skip (go back to the newest checkpoint, and
    # never train on that global batch: RUN/skipped.jsonl)
    spike_factor: float = 0.0  # times the median loss of the last 64 steps that count as a spike; 0 = none do


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the run happens."""

    launcher: str = "local"  # local = `pipeline train` on this machine; slurm, docker, skypilot = `pipeline launch`
    # submits a job, starts containers, or rents the machines
    nodes: int = 1
    devices: int = 1  # processes a node, one a GPU
    accelerator: str = "auto"  # auto, cpu or cuda
    workers: int = -1  # decoding processes a rank; 0 = decode in the training process; -1 = 0 on CPU, on CUDA a
    # core less than the node has for each rank
    timeout_minutes: float = 10.0  # a collective that takes longer ends the run
    hang_seconds: float = 40.0  # without any move, after which a rank is named; half as long again, and all end (3.5
    # times as long where it reads or writes). Never less than 3 times the longest seen; 0 = no watch
    lead_seconds: float = 120.0  # between a signal and the end by force: time for the last checkpoint


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What is asked of Slurm, and how a job starts its processes. Read where cluster.launcher is slurm."""

    partition: str = ""  # several with commas; "" = the cluster's own choice, as in the next five
    account: str = ""
    qos: str = ""
    constraint: str = ""  # features of the nodes
    exclude: str = ""  # nodes that are passed over
    memory: str = ""  # of a node, as 480G; 0 = all it has
    minutes: int = 1440  # after which a start ends; 0 = the partition's limit
    lead_minutes: int = 5  # before that end a signal says so, and the job goes on in a new start; 0 = no signal
    cpus_per_task: int = 0  # cores of a process; 0 = the cluster's own choice
    gpus_per_node: int = -1  # 0 = none; -1 = one a process, none where cluster.accelerator is cpu
    options: list[str] = field(default_factory=list)  # more of sbatch's: ["--reservation=name"]
    modules: list[str] = field(default_factory=list)  # loaded before the start
    setup: list[str] = field(default_factory=list)  # lines of bash that the job runs before the start, as they are
    python: str = ""  # the interpreter that has this package; "" = the one that launches, in a container python3
    container: str = "none"  # none, apptainer or pyxis
    image: str = ""  # a .sif or .sqsh file, or what the container's tool takes for one
    mounts: list[str] = field(default_factory=list)  # SOURCE[:TARGET[:ro]]; the run's and the data's are always there,
    # and data.cache where no variable names it
    launcher: str = "srun"  # srun = a task a process; torchrun = a task a node
    resubmit: str = "requeue"  # how an interrupted job goes on: requeue = the same job; chain = one that follows it
    check: bool = True  # let every rank look (`pipeline doctor --nodes`) before each start; a fault ends the job
    restarts: int = 100  # starts after the first that the job gives itself; 0 = none. Slurm's own are not bounded
    interface: str = ""  # network of NCCL and gloo, as ib0; "" = left to them
    infiniband: str = ""  # adapters of NCCL, as mlx5_0,mlx5_3:1; off = none; "" = left to it


@dataclass(frozen=True, kw_only=True)
class DockerConfig:
    """How containers are started, one a node. Read where cluster.launcher is docker."""

    image: str = "pipeline"  # made by docker/Dockerfile
    engine: str = ""  # docker or podman; "" = the first of them that is here
    user: str = ""  # UID or UID:GID; "" = who launches, so that the run's files are theirs
    gpus: str = "all"  # or their numbers, as 0,1; none where the run is on the CPU
    shared_memory: str = "8g"  # the limit of a container's own; host = that of the machine
    scratch: str = "pipeline-scratch"  # for caches, at /scratch: a volume of the engine, or an absolute directory
    mounts: list[str] = field(default_factory=list)  # SOURCE[:TARGET[:ro]]; the run's and the data's are always there
    env_file: str = ""  # file of NAME=value lines, for secrets; mode 0600
    variables: list[str] = field(default_factory=list)  # names of variables of the launching shell that are handed on
    options: list[str] = field(default_factory=list)  # more of `docker run`: ["--device=/dev/infiniband"]
    address: str = ""  # of the first of several nodes, as the others reach it; "" = this machine's name
    port: int = 29400  # there
    interface: str = ""  # network of NCCL and gloo, as eth0; "" = left to them


@dataclass(frozen=True, kw_only=True)
class SkyPilotConfig:
    """What is asked of SkyPilot, which rents machines of any cloud. Read where cluster.launcher is skypilot."""

    image: str = ""  # REGISTRY/NAME:TAG, pulled by the nodes; its user must be root
    infra: str = ""  # as aws, gcp/us-central1 or k8s/CONTEXT; "" = the cheapest that is enabled
    accelerator: str = "H100"  # as `sky gpus list` names it; one a process, none where cluster.accelerator is cpu
    cpus: str = ""  # of a node, as 96 or 96+; "" = left to SkyPilot, as in the next two
    memory: str = ""  # of a node in GiB, as 480+
    disk_gb: int = 0  # of a node: image, caches and shards that come from a bucket
    spot: bool = True  # machines that may be taken away, at a third of the price; the run goes on on others
    bucket: str = ""  # URL below which run directories are kept, as s3://NAME/runs
    secrets: list[str] = field(default_factory=list)  # names of variables, set here or kept by SkyPilot's server
    python: str = "/opt/venv/bin/python"  # the interpreter in the image


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is reported where. metrics.csv is always written."""

    mode: str = "auto"  # auto (online with a key, else offline), online, offline or disabled
    entity: str | None = None
    project: str = "pipeline"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: str = "digests"  # what W&B keeps of data set, best and last checkpoint and uncommitted code: none,
    # digests (with the places where they lie), or files
    every_steps: int = 10  # optimizer steps between rows
    system_every_seconds: int = 15  # between looks at each node (system/node-<n>.csv); 0 = never
    norms_every_steps: int = 100  # optimizer steps between looks at every norm (norms.csv); 0 = never
    percentiles_every_steps: int = 0  # optimizer steps between looks at pre-activations (percentiles.csv); 0 = never
    gradients_every_steps: int = 0  # optimizer steps between histograms of gradients (gradients.csv); 0 = never
    layers: list[str] = field(default_factory=list)  # patterns of names, as "body.5*", for these two; empty = the
    # pre-activations of the last hidden layer, and the gradients of every weight
    goodput_alert: float = 0.0  # goodput below which W&B alerts, an hour after the run first began; 0 = never


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, complete."""

    schema: int = SCHEMA
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    docker: DockerConfig = field(default_factory=DockerConfig)
    skypilot: SkyPilotConfig = field(default_factory=SkyPilotConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ledger: bool = False  # write the keys of every step's samples

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.run.dir) / self.run.id

    @property
    def way_on(self) -> str:
        """The command that goes on with the run."""
        return f"pipeline {'train' if self.cluster.launcher == 'local' else 'launch'} {self.directory}/config.yaml"

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.cluster.nodes * self.cluster.devices


def by_key(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found.update(by_key(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


KEYS = by_key(dataclasses.asdict(Config()))  # every key, with what it is when nobody says
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
