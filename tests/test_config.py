from dataclasses import asdict, fields, is_dataclass

import pytest

from pipeline.config import (
    CONF,
    Config,
    ConfigError,
    by_key,
    completed,
    compose_config,
    differences,
    identity,
    read_config,
    statistics_group,
    to_yaml,
)

RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
TODAYS = ("modern", "large_batch", "fast")
DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
MEMBERS = [f"bn_x30_member_{n}" for n in range(6)]
CLUSTERS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("data", DATA)
def test_every_recipe_composes_with_every_data_set(recipe, data):
    config = compose_config([f"recipe={recipe}", f"data={data}"])
    assert (config.run.recipe, config.run.data, config.run.cluster) == (recipe, data, "local")


def test_every_file_of_the_axes_is_a_page_with_its_command():
    assert set(RECIPES) == {
        "inception",
        "bn_baseline",
        "bn_x5",
        "bn_x30",
        *MEMBERS,
        "bn_x5_sigmoid",
        "smoke",
        *TODAYS,
        "mlp_sigmoid",
        "mlp_sigmoid_bn",
        "fine_tune",
    }
    assert set(DATA) == {"digits", "cifar10", "mnist", "imagenet", "folder"}
    for recipe in RECIPES:
        page = (CONF / "recipe" / f"{recipe}.yaml").read_text()
        assert f"recipe={recipe} " in page
        assert "Expected:" in page


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_is_a_page_with_its_command_and_only_a_circumstance(cluster):
    needed = ["slurm.partition=gpu", "skypilot.image=REGISTRY/pipeline:1", "skypilot.bucket=s3://ours/runs"]
    there = compose_config(["data=digits", f"cluster={cluster}", *needed])
    assert identity(there) == identity(compose_config(["data=digits"]))
    page = (CONF / "cluster" / f"{cluster}.yaml").read_text()
    assert f"cluster={cluster} " in page or there.cluster.launcher == "local"


def test_recipes_carry_the_papers_values():
    names = [name for name in RECIPES if name not in TODAYS]
    values = {name: compose_config([f"recipe={name}", "data=imagenet"]) for name in names}
    rates = {name: c.optimizer.rate for name, c in values.items()}
    assert rates == {
        "inception": 0.0015, "bn_baseline": 0.0015, "bn_x5": 0.0075, "bn_x30": 0.045, "bn_x5_sigmoid": 0.0075,
        "smoke": 0.0075, "mlp_sigmoid": 0.1, "mlp_sigmoid_bn": 0.1, **dict.fromkeys(MEMBERS, 0.045),
        "fine_tune": 0.00125,
    }  # fmt: skip
    baseline = values["bn_baseline"]
    for name in ("bn_x5", "bn_x30", "bn_x5_sigmoid"):
        faster = values[name]
        assert baseline.schedule.decay_epochs / faster.schedule.decay_epochs == pytest.approx(6)
        assert baseline.optimizer.weight_decay / faster.optimizer.weight_decay == pytest.approx(5)
        assert (faster.model.dropout, faster.model.response_norm, faster.augment.photometric) == (0.0, False, "reduced")
    for name in ("inception", "bn_baseline"):
        plain = values[name]
        assert (plain.model.dropout, plain.model.response_norm, plain.augment.photometric) == (0.4, True, "full")
    assert values["inception"].model.name == "inception"
    assert values["bn_x5_sigmoid"].model.activation == "sigmoid"
    assert all(c.optimizer.rate_batch_size == 32 for name, c in values.items() if "mlp" not in name)
    bare, normalized = (by_key(asdict(values[name])) for name in ("mlp_sigmoid", "mlp_sigmoid_bn"))
    assert bare["data.global_batch_size"] == 60  # of section 4.1, as are the layers (models/mlp.py)
    assert {key for key in bare if bare[key] != normalized[key]} == {"run.recipe", "model.name"}


def test_members_of_the_ensemble_are_bn_x30_with_the_changes_that_the_paper_names():
    """Each change is there more than once, alone and with another; no two members are alike; seeds are their own."""
    of_paper = by_key(asdict(compose_config(["recipe=bn_x30", "data=imagenet"])))
    changes = []
    for number, name in enumerate(MEMBERS):
        member = by_key(asdict(compose_config([f"recipe={name}", "data=imagenet"])))
        assert member["seed"] == number
        changes.append({key: value for key, value in member.items()
                        if value != of_paper[key] and key not in ("seed", "run.recipe")})  # fmt: skip
    assert changes == [
        {"model.initial_gain": 1.5}, {"model.dropout": 0.05}, {"model.dropout": 0.1}, {"model.per_activation": 1},
        {"model.dropout": 0.05, "model.initial_gain": 1.5}, {"model.dropout": 0.1, "model.per_activation": 2},
    ]  # fmt: skip


def test_recipes_of_today_are_whole_runs_of_their_curves_with_groups_that_hold_32_to_128_images():
    for name in TODAYS:
        for world in (8, 16, 32, 64):
            c = compose_config([f"recipe={name}", "data=imagenet", f"cluster.devices={world}"])
            share = c.data.global_batch_size / (world * -(-c.data.global_batch_size // (world * 128)))
            assert 32 <= share * int(statistics_group(c, world)) <= 128
        assert c.schedule.epochs == c.trainer.max_epochs
        assert (c.data.micro_batch_size, c.norm.group_images, c.trainer.precision) == (128, 128, "bf16")
        page = (CONF / "recipe" / f"{name}.yaml").read_text()
        assert "not run by us" in page
        assert f"recipe={name} data=cifar10" in page


def test_cifar10_changes_nothing_of_a_recipe_but_what_its_page_states():
    plain, cifar = (asdict(compose_config(["recipe=bn_x5", f"data={data}"])) for data in ("imagenet", "cifar10"))
    changed = {
        f"{section}.{key}"
        for section in ("model", "norm", "augment", "optimizer", "schedule", "loss", "trainer")
        for key in plain[section]
        if plain[section][key] != cifar[section][key]
    }
    assert changed == {"model.stem", "model.width", "trainer.max_epochs", "trainer.validate_every_epochs"}


def test_config_survives_its_file(tmp_path):
    config = compose_config(["recipe=bn_x30", "data=cifar10", "tracking.tags=[a,b]", "model.dropout=0.1", "seed=3"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config
    assert read_config(path, ["trainer.max_steps=5"]).trainer.max_steps == 5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.max_epoch=3", ["trainer.max_epoch is not a key", "did you mean trainer.max_epochs?"]),
        ("rate=3", ["did you mean optimizer.rate?"]),
        ("recipe=bnx5", ["recipe = 'bnx5' is not offered", "did you mean bn_x5?", "choose one of"]),
        ("seed=abc", ["seed = 'abc' has the wrong type; it must be a whole number"]),
        ("seed=1.5", ["seed = 1.5 has the wrong type; it must be a whole number"]),
        ("data.mean=[a,b,c]", ["data.mean = ['a', 'b', 'c'] has the wrong type; it must be a list of numbers"]),
        ("data.mean=[1,2]", ["data.mean", "three numbers"]),
        ("tracking.tags=x", ["tracking.tags = 'x'", "a list"]),
        ("model.dropout=2", ["model.dropout = 2.0 must lie between 0 and 0.999"]),
        ("model.stem=tiny", ["model.stem = 'tiny' is not offered; choose one of ['separable', 'dense', 'small']"]),
        ("model.per_activation=11", ["model.per_activation = 11 must lie between 0 and 10"]),
        ("trainer.precision=16", ["trainer.precision = '16' is not offered"]),
        ("data.global_batch_size=0", ["data.global_batch_size = 0 is too small; it must be at least 1"]),
        ("optimizer.rate=-1", ["optimizer.rate = -1.0 must be positive"]),
        ("epochs", ["'epochs' is not key=value; for example trainer.max_epochs=10"]),
        ("run.id=a=b", ["'run.id=a=b' cannot be read; put quotes around the value"]),
        ("run.id=../x", ["run.id = '../x' is a path; give a name"]),
        ("model=3", ["model is not a key"]),
        ("seed=4294967296", ["seed = 4294967296 must lie between 0 and 4294967295"]),
        ("optimizer.rate=nan", ["optimizer.rate = nan must be positive"]),
        ("norm.group_size=rack", ["norm.group_size = 'rack' is not offered", '"node"']),
        ("data.stage=true", ["data.stage = true copies shards to data.cache, which is not set; give a directory on"]),
        ("data.stage=/scratch", ["data.stage = '/scratch' has the wrong type; it must be true or false"]),
        ("data.cache=${SCRATCH}/a", ["key 'SCRATCH' not found; a variable of the environment is $NAME, without"]),
    ],
)
def test_a_wrong_override_is_one_line_with_field_value_rule_and_way_out(override, parts):
    message = refused(override)
    assert all(part in message for part in parts), message


def test_a_group_size_that_does_not_divide_is_refused_where_the_user_types():
    assert refused("norm.group_size=3", "cluster.devices=8") == (
        "norm.group_size = 3 does not divide the world of 8 ranks; choose one of [1, 2, 4, 8], or 0 for all"
    )


def test_single_activations_are_normalized_by_bn_inception_alone():
    assert refused("model.per_activation=1", "model.name=resnet50") == (
        "model.per_activation = 1 is for model.name = bn_inception, not resnet50; leave it at 0"
    )


@pytest.mark.parametrize(
    ("world", "batch", "micro", "group"),
    [(64, 8192, 0, 1), (256, 8192, 0, 4), (128, 8192, 0, 2), (8, 8192, 128, 1), (3, 96, 0, 0), (1, 24, 0, 0),
     (12, 1200, 0, 1), (6, 250, 0, 3), (96, 3072, 0, 4)],
)  # fmt: skip
def test_a_group_holds_as_many_images_on_any_number_of_ranks(world, batch, micro, group):
    config = compose_config(
        ["norm.group_images=128", f"cluster.devices={world}", f"data.global_batch_size={batch}",
         f"data.micro_batch_size={micro}"]
    )  # fmt: skip
    assert statistics_group(config, world) == group


def test_a_group_of_so_many_images_that_cannot_be_is_refused_with_the_way_out():
    large = ("norm.group_images=128", "data.global_batch_size=8192")
    assert refused(*large, "cluster.devices=8") == (
        "norm.group_images = 128, and one of 8 ranks holds 1024 images at once; set data.micro_batch_size=128, or run "
        "on 64 ranks or more"
    )
    assert "make groups of [20, 140], none of 32 to 128" in refused(
        "norm.group_images=128", "data.global_batch_size=140", "cluster.devices=7"
    )
    assert "say the same thing twice" in refused("norm.group_images=128", "norm.group_size=1")


def test_a_gamma_of_zero_is_for_residual_branches():
    assert compose_config(["model.name=resnet50", "model.zero_gamma=true"]).model.zero_gamma
    assert "bn_inception has no residual branch" in refused("model.zero_gamma=true")


def test_statistics_may_be_those_of_a_node():
    config = compose_config(["norm.group_size=node", "cluster.devices=4", "cluster.nodes=2"])
    assert config.norm.group_size == "node"


def test_what_counts_as_a_spike_is_above_the_median():
    assert "must be above 1, or 0 for none" in refused("trainer.spike_factor=0.5")
    assert "choose one of ['stop', 'skip']" in refused("trainer.on_nan=ignore")


def test_curves_and_averages_without_an_end_are_refused():
    for word in ("schedule.epochs=inf", "augment.growth_epochs=inf", "averaging.start_epochs=inf"):
        assert "= inf has no end; give a number" in refused(word)


def test_a_comparison_of_statistics_is_of_one_network():
    assert "leave one of them out" in refused("norm.compare=true", "averaging.decay=0.9")


def test_a_comparison_of_statistics_needs_both():
    assert "norm.precise_images = 0 makes none; set norm" in refused("norm.compare=true", "norm.precise_images=0")


def test_optimizers_and_curves_that_cannot_be_are_refused_where_the_user_types():
    assert "'lar' is not offered; did you mean lars?" in refused("optimizer.name=lar")
    assert "is not of lamb" in refused("optimizer.name=lamb", "optimizer.nesterov=true")
    assert "optimizer.momentum = 0" in refused("optimizer.nesterov=true", "optimizer.momentum=0")
    assert "clips a ratio that sgd does not have" in refused("optimizer.trust_clip=true")
    assert "needs an end" in refused("schedule.form=cosine", "trainer.max_epochs=-1", "trainer.max_steps=9")
    assert "leaves nothing of the 3 epochs of the cosine" in refused(
        "schedule.form=cosine", "schedule.warmup_epochs=3", "trainer.max_epochs=3"
    )


def test_images_that_cannot_grow_are_refused_where_the_user_types():
    growing = ("data=folder", "data.root=x", "augment.first_size=0.6", "augment.growth_epochs=3")
    assert compose_config(growing).augment.growth_steps == 3
    assert "augment.first_size = 1.5 must lie between 0.1 and 1" in refused("augment.first_size=1.5")
    assert "leaves no epoch" in refused(*growing, "augment.growth_epochs=0")
    assert "is not for model.name = mlp, which takes images of one size" in refused(*growing, "model.name=mlp")
    assert "is not for model.per_activation" in refused(*growing, "model.per_activation=1")
    assert "augment.mixup = 3.0 must lie between 0 and 2" in refused("augment.mixup=3")


def test_a_run_needs_an_end():
    assert "the run would not end" in refused("trainer.max_epochs=-1")


def test_a_cluster_may_stage_whatever_it_is_given():
    """A page of a cluster may ask for it: shards of a URL come to its nodes anyhow."""
    config = compose_config(["data=folder", "data.root=s3://bucket/set", "data.stage=true"])
    assert (config.data.location[0], config.data.location[-1]) == ("s3://bucket/set", True)


def test_the_name_of_a_cache_stays_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", "/here")
    config = compose_config(["data=digits", "data.stage=true", "data.cache=$SLURM_TMPDIR/$USER"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml").data.cache == config.data.cache == "$SLURM_TMPDIR/$USER"


def test_identity_and_circumstance_are_told_apart():
    old = compose_config(["recipe=bn_x5", "data=digits"])
    elsewhere = compose_config(
        ["cluster.devices=4", "cluster.workers=2", "trainer.max_epochs=99", "tracking.mode=disabled", "ledger=true",
         "data.micro_batch_size=4", "run.dir=/elsewhere", "data.root=/other", "trainer.on_nan=skip",
         "trainer.spike_factor=10", "cluster.hang_seconds=0", "data.stage=true", "data.cache=/scratch",
         "data.cache_gb=100", "norm.compare=true"]
    )  # fmt: skip
    assert differences(elsewhere, old) == []
    other = differences(compose_config(["seed=1", "optimizer.rate=0.1", "data.global_batch_size=64"]), old)
    assert other == [
        "seed = 1, the run has 0",
        "data.global_batch_size = 64, the run has 32",
        "optimizer.rate = 0.1, the run has 0.0075",
    ]
    settled = completed(old, data={"digest": "abc", "num_classes": 10}, trainer={"threads": 2})
    assert differences(old, settled) == []
    assert differences(completed(settled, data={"digest": "xyz"}), settled)


def test_a_broken_config_file_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    for text, message in (
        ("a: [", "config.yaml: "),
        ("- 1", "holds no keys"),
        ("schema: 9", "schema = 9, this version reads 1"),
        ("", "schema"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path)
    with pytest.raises(ConfigError, match=r"No such file or directory; give the config\.yaml of a run"):
        read_config(tmp_path / "nowhere.yaml")
    path.write_text(to_yaml(Config()) + "extra: 1\n")
    with pytest.raises(ConfigError, match="extra is not a key"):
        read_config(path)


def test_every_section_is_frozen_and_documented():
    for section in fields(Config):
        value = getattr(Config(), section.name)
        if is_dataclass(value):
            assert type(value).__doc__
            assert type(value).__dataclass_params__.frozen
