"""The shipped models: files, limits, accuracy on the real test split, and independence of the batch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from kinds import a, classifier

import steerfm
from steerfm import encoders, plugins, zoo
from steerfm.flowmap import NeuralFlowMap
from steerfm.metrics import frechet_distance, posterior_errors, texture


@pytest.fixture(scope="module")
def fashion():
    return steerfm.load("fashion")


def test_every_model_has_its_card_and_keeps_the_limits():
    files = [file for folder in plugins.folders() for file in folder.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) < 40 * 2**20
    assert all(file.stat().st_size < 16e6 for file in files)
    models = zoo.models()
    assert set(models) == {
        "brisque",
        "emoji",
        "emoji-clip",
        "emoji-judge",
        "fashion",
        "fashion-classifier",
        "fashion-judge",
    }
    for head in models.values():
        assert {"data", "licence", "recipe", "command", "commit", "metrics"} <= head["card"].keys()


def test_models_load_whatever_else_was_loaded_before(monkeypatch):
    """transformers wraps torch's linspace while it loads a model. Where torch looks at its functions only then, it takes the
    wrapped one for its own, and the true one makes tensors of the CPU inside ``with torch.device(...)`` from then on."""
    with torch.device("meta"):
        torch.empty(0)  # now it has looked
    create = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: create(*args, **({"device": "cpu"} | options)))
    assert steerfm.load("fashion").jump(torch.zeros(1, 1, 28, 28), 0.0, 1.0).isfinite().all()
    assert steerfm.load("emoji").shape == (3, 32, 32)
    assert zoo.load_classifier("fashion-judge")[1]


@pytest.mark.slow
@pytest.mark.data("fashion")
@pytest.mark.parametrize("name", ["fashion-classifier", "fashion-judge"])
def test_classifiers_reach_their_accuracy(name):
    from steerfm_zoo.fashion.data import fashion_mnist

    network, names, _ = zoo.load_classifier(name)
    pictures, labels = fashion_mnist("test")
    with torch.inference_mode():
        right = [(network(p.float() / 255).argmax(1) == y).sum() for p, y in zip(pictures.split(500), labels.split(500))]
    assert sum(right) / len(labels) >= 0.91
    assert len(names) == 10


@pytest.mark.slow
@pytest.mark.data("fashion")
@pytest.mark.parametrize("name", ["fashion-classifier", "fashion-judge"])
def test_shipped_statistics_are_those_of_the_test_split(name):
    from steerfm_zoo.fashion.data import fashion_mnist

    network, pictures = classifier(name), fashion_mnist("test")[0].float() / 255
    with torch.inference_mode():
        features = torch.cat([network.features(part) for part in pictures.split(500)]).double()
    kept = zoo.statistics(name)
    distance = frechet_distance(features.mean(0), features.T.cov(), kept["test_mean"], kept["test_cov"])
    floor = frechet_distance(kept["train_mean"], kept["train_cov"], kept["test_mean"], kept["test_cov"])
    assert distance < 1e-3 * floor
    assert kept["test_texture"].item() == pytest.approx(texture(pictures).mean().item()) and kept["test_count"] == 10_000
    assert torch.cdist(kept["test_rows"][:50], features).amin(1).max() < 0.01  # stored in half precision


@pytest.mark.parametrize("name", ["fashion-classifier", "fashion-judge"])
def test_shipped_rows_are_a_random_part_of_the_test_split(name):
    kept = zoo.statistics(name)
    z = (kept["test_rows"].mean(0) - kept["test_mean"]) / (kept["test_cov"].diagonal() / len(kept["test_rows"])).sqrt()
    assert z[kept["test_cov"].diagonal() > 0].abs().max() < 5 and len(kept["test_rows"]) == 2000
    assert float(kept["test_rows"].var(0).sum() / kept["test_cov"].trace()) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_the_flow_map_draws_the_class_it_is_asked_for(fashion):
    judge = zoo.load_classifier("fashion-judge")[0]
    labels = torch.arange(200) % 10
    for steps, least in ((1, 0.6), (4, 0.8)):
        pictures = fashion.decode(steerfm.sample(fashion, n=200, steps=steps, seeds=0, cond=labels))
        assert (judge(pictures).argmax(1) == labels).float().mean() > least


@pytest.mark.slow
def test_the_map_of_words_draws_what_it_is_asked_for():
    """Retrieval of the right one among twelve prompts, by the shipped open_clip model; chance is 1/12."""
    flow_map, network = steerfm.load("emoji"), encoders.open_clip("emoji-clip")
    prompts = ["red heart", "blue heart", "grinning face", "dog face", "pizza", "airplane", "blue book", "house", "rocket"]
    prompts += ["snowman", "sunflower", "guitar"]
    cond = flow_map.condition(prompts * 2, 24)
    with torch.inference_mode():
        texts = network.encode_text(prompts)
        for steps, least in ((1, 0.5), (4, 0.5)):
            found = network.encode_image(flow_map.decode(steerfm.sample(flow_map, 24, steps, 0, cond))) @ texts.T
            assert (found.argmax(1) == torch.arange(24) % 12).float().mean() >= least


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(fashion):
    """Equal to float tolerance: the convolutions choose other kernels for other batch sizes."""
    labels = torch.arange(64) % 10
    whole = steerfm.sample(fashion, n=64, steps=2, seeds=0, cond=labels, batch_size=64)
    for size in (1, 7):
        assert torch.allclose(steerfm.sample(fashion, n=64, steps=2, seeds=0, cond=labels, batch_size=size), whole, atol=1e-4)
    assert torch.equal(steerfm.sample(fashion, n=64, steps=2, seeds=0, cond=labels, batch_size=64), whole)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"micro_batch": 5}])
def test_steering_does_not_depend_on_the_batch(fashion, options):
    reward, method = steerfm.reward("brightness"), steerfm.FeynmanKac(particles=4, steps=3)
    a = steerfm.steer(fashion, reward, method, n=3, seeds=5, strength=20.0)
    b = steerfm.steer(fashion, reward, method, n=3, seeds=5, strength=20.0, **options)
    assert torch.equal(a.trace.ancestors, b.trace.ancestors)
    assert torch.allclose(a.samples, b.samples, atol=1e-3)


def test_steering_a_real_model_towards_a_real_reward(fashion):
    """More of what is asked for than plain sampling, by the reward and by the judge that was not asked."""
    reward, judge = (steerfm.reward(name, target="Bag") for name in ("classifier", "judge"))
    result = steerfm.steer(fashion, reward, steerfm.FeynmanKac(particles=8, steps=6), n=6, seeds=0, strength=10.0)
    base = fashion.decode(steerfm.sample(fashion, n=6, steps=6, seeds=0))
    best = fashion.decode(result.best())
    assert reward(best).mean() > reward(base).mean() + 1 and judge(best).mean() > judge(base).mean() + 1


def test_classes_by_name(fashion):
    assert fashion.condition("bag", 2).tolist() == [8, 8]
    with pytest.raises(ValueError, match="classes: 0 T-shirt"):
        fashion.condition("hat", 1)


def test_a_velocity_can_forget_its_jumps(tmp_path):
    """The start of benchmarks/ablation.py: the same velocity, and one Euler step for every jump."""
    forget_jumps = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "ablation.py"))["forget_jumps"]
    names = ("fashion", forget_jumps("fashion", tmp_path / "start.safetensors"))
    trained, forgot = (a(NeuralFlowMap, steerfm.load(name)) for name in names)
    x, cond = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    velocity = trained.velocity(x, 0.3, cond)
    assert torch.allclose(forgot.velocity(x, 0.3, cond), velocity, atol=1e-5)
    assert torch.allclose(forgot.network(x, *times(0.3, 0.9), cond), forgot.network(x, *times(0.3, 0.3), cond), atol=1e-6)
    assert not torch.allclose(trained.network(x, *times(0.3, 0.9), cond), trained.network(x, *times(0.3, 0.3), cond), atol=0.1)


def times(*values):
    return (torch.full((4,), value) for value in values)


@pytest.mark.slow
def test_the_shipped_posterior_map_draws_as_its_velocity_does():
    """In one call nearer to many calls of the velocity than two of them."""
    flow_map, classify = zoo.load("fashion"), zoo.load_classifier("fashion-classifier")[0]
    errors = posterior_errors(flow_map, 3, draws=32, fine=8, classify=classify, times=(0.3,))
    assert errors.distance["1 call"][0.3] < errors.distance["GLASS, 2 calls"][0.3]
    assert errors.value["1 call"][0.3] < errors.value["jump, 1 call"][0.3]


def test_the_shipped_posterior_map_is_a_plain_map_from_noise_and_draws_differ():
    flow_map = zoo.load("fashion")
    e = torch.randn(2, 4, *flow_map.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = flow_map.lookahead(e[0], 0.0)
        x = (0.3 * data[:1] + 0.7 * e[1][:1]).expand_as(data)
        torch.testing.assert_close(flow_map.posterior(x, 0.0, e[0]), data)
        assert flow_map.posterior(x, 0.3, e[0]).std(0).mean() > 0.05
