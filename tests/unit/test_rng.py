import pytest
import torch

from distributed import rng
from distributed.models.keyed_dropout import KeyedDropout

IDS = torch.tensor([0, 1, 2, 49_999, 2**31])
# Stored vectors: if one of them changes, checkpoints no longer resume the same experiment.
KEYS = [
    [1186766407, 1988905049],
    [1653349795, 753638323],
    [143117259, 2730245074],
    [1765891579, 1701173055],
    [463183233, 1411590925],
]
MASK = ["0000101111111", "0101000111010", "1111001010001", "1011111001001", "0110001111100"]


def keys_of(count: int, *, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return rng.sample_keys(torch.arange(count), seed=seed, epoch=epoch)


def bits(mask: torch.Tensor) -> list[str]:
    return ["".join(map(str, row)) for row in mask.int().tolist()]


def lowbias32(x: int, between: int = 0) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF ^ between
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def test_sample_keys_equal_the_stored_vector():
    assert rng.sample_keys(IDS, seed=7, epoch=3).tolist() == KEYS


def test_key_words_equal_the_stored_vector():
    assert rng.key_words("sample", 7, 3) == (2489059859, 1570916816)


def test_draws_equal_the_stored_vector():
    keys = torch.tensor(KEYS)
    assert rng.draws(keys, "crop_y").tolist() == [3751467237, 1300344682, 2705002807, 525261032, 3358784716]
    assert rng.integers(keys, "crop_y", 9).tolist() == [7, 2, 5, 1, 7]


def test_draws_for_several_purposes_equal_those_for_each():
    keys = keys_of(100)
    purposes = ("a", "b", "mixup_0_x")
    together = rng.unit_of_each(keys, purposes)
    assert together.dtype == torch.float64
    assert torch.equal(together, torch.stack([rng.unit(keys, purpose) for purpose in purposes]))


def test_permutations_equal_the_stored_vectors():
    assert rng.permutation(12, seed=0, epoch=0).tolist() == [6, 11, 8, 7, 10, 3, 4, 0, 9, 5, 2, 1]
    assert rng.permutation(12, seed=0, epoch=1).tolist() == [9, 4, 5, 8, 11, 7, 2, 10, 1, 6, 0, 3]


def test_the_dropout_mask_equals_the_stored_vector():
    layer = KeyedDropout(0.5, name="dropout1")
    assert bits(layer.kept(torch.tensor(KEYS), 13)) == MASK


def test_filled_weights_equal_the_stored_vector():
    tensor = torch.empty(2, 3)
    rng.fill_uniform_(tensor, 0.5, seed=7, name="fc1.weight")
    assert tensor.tolist() == [
        [-0.07533586770296097, -0.44472309947013855, 0.3694649934768677],
        [-0.3353910744190216, -0.3806588649749756, -0.3760167956352234],
    ]


def test_hashes_equal_those_of_unbounded_integers():
    ids = [*range(50), 2**31 - 1, 2**31, 2**32 - 1]
    first, second = rng.key_words("sample", 1, 2)
    expected = [[lowbias32(i ^ first, second), lowbias32(i ^ second, first)] for i in ids]
    assert rng.sample_keys(torch.tensor(ids), seed=1, epoch=2).tolist() == expected


@pytest.mark.slow  # the compiler is slow
@pytest.mark.timeout(600)
def test_the_compiled_mask_equals_the_eager_one():
    layer = KeyedDropout(0.5, name="dropout1")
    compiled = torch.compile(lambda keys: layer.kept(keys, 13), fullgraph=True)
    assert bits(compiled(torch.tensor(KEYS))) == MASK
    many = keys_of(300, seed=5)
    assert torch.equal(compiled(many), layer.kept(many, 13))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_numbers():
    device = torch.device("cuda")
    keys = rng.sample_keys(IDS.to(device), seed=7, epoch=3)
    assert keys.tolist() == KEYS
    assert bits(KeyedDropout(0.5, name="dropout1").kept(keys, 13)) == MASK
    on_gpu = rng.permutation(50_000, seed=0, epoch=0, device=device)
    assert torch.equal(on_gpu.cpu(), rng.permutation(50_000, seed=0, epoch=0))


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_has_every_id_once(count):
    order = rng.permutation(count, seed=3, epoch=4)
    assert order.sort().values.tolist() == list(range(count))


def test_permutations_of_other_epochs_and_seeds_differ():
    orders = [rng.permutation(1000, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10  # about one position agrees by chance


def test_a_permutation_is_uniform():
    mean_place = torch.stack([rng.permutation(100, seed=0, epoch=e).argsort() for e in range(400)]).double().mean(0)
    assert (mean_place - 49.5).abs().max() < 5 * 28.9 / 400**0.5


def test_a_samples_keys_do_not_depend_on_the_other_samples():
    keys = keys_of(100, seed=1, epoch=2)
    order = rng.permutation(100, seed=9, epoch=9)
    assert torch.equal(rng.sample_keys(order, seed=1, epoch=2), keys[order])
    assert torch.equal(rng.sample_keys(order[:7], seed=1, epoch=2), keys[order[:7]])
    assert torch.equal(rng.draws(keys[order[:7]], "flip"), rng.draws(keys, "flip")[order[:7]])


def test_drawing_does_not_modify_ids_and_keys():
    ids, keys = torch.arange(10), keys_of(10)
    before = ids.clone(), keys.clone()
    rng.sample_keys(ids, seed=1, epoch=1)
    rng.integers(keys, "flip", 2)
    units = rng.unit_keys(rng.layer_words("a"), 8)
    rng.at_least16(keys, units, 7)
    assert torch.equal(ids, before[0])
    assert torch.equal(keys, before[1])
    assert torch.equal(units, rng.unit_keys(rng.layer_words("a"), 8))


def test_no_samples_have_no_draws():
    keys = keys_of(0)
    assert keys.shape == (0, 2)
    assert rng.integers(keys, "flip", 2).shape == (0,)
    assert KeyedDropout(0.5, name="a").kept(keys, 6).shape == (0, 6)


def test_draws_are_uniform():
    numbers = rng.draws(keys_of(64_000), "crop_x")
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < 2**32
    counts = torch.bincount(numbers >> 26, minlength=64).double()
    assert (
        (counts - 1000).square() / 1000
    ).sum() < 120  # chi squared with 63 degrees of freedom exceeds this once in 10,000


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_each_bit_of_a_draw_is_unbiased(bit):
    ones = (rng.draws(keys_of(40_000), "flip") >> bit & 1).double().mean()
    assert abs(ones - 0.5) < 4 * 0.5 / 200


@pytest.mark.parametrize("below", [1, 2, 9, 33])
def test_integers_fill_their_range_evenly(below):
    counts = torch.bincount(rng.integers(keys_of(below * 1000), "crop_y", below), minlength=below)
    assert len(counts) == below
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_integers_reach_the_largest_range():
    numbers = rng.integers(keys_of(1000), "wide", 2**31)
    assert int(numbers.min()) >= 0
    assert 2**30 < int(numbers.max()) < 2**31


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().view(-1), b.double().view(-1)]))[0, 1])


def test_draws_for_other_purposes_or_epochs_are_independent():
    keys = keys_of(20_000)
    one = rng.draws(keys, "crop_y")
    others = [
        rng.draws(keys, "crop_x"),
        rng.draws(keys_of(20_000, epoch=1), "crop_y"),
        rng.draws(keys_of(20_000, seed=1), "crop_y"),
        one.roll(1),
    ]
    assert [abs(correlation(one, other)) < 0.03 for other in others] == [True] * 4


def test_dropout_mask_bits_are_independent():
    layer, other_layer = (KeyedDropout(0.5, name=name) for name in ("dropout1", "dropout2"))
    keys = keys_of(2000)
    mask = layer.kept(keys, 64)
    pairs = [
        (mask[:, :32], mask[:, 32:]),  # the halves of the same hash
        (mask[:, :-1], mask[:, 1:]),
        (mask[:-1], mask[1:]),
        (mask, layer.kept(keys_of(2000, epoch=1), 64)),
        (mask, other_layer.kept(keys, 64)),
        (mask, layer.kept(keys, 64, use=1)),
        (layer.kept(keys, 64, use=1), layer.kept(keys, 64, use=2)),
    ]
    assert [abs(correlation(*pair)) < 0.015 for pair in pairs] == [True] * 7


def test_filled_weights_depend_on_seed_and_name_only():
    def filled(seed: int, name: str) -> torch.Tensor:
        tensor = torch.full((40, 30), float("nan"))
        rng.fill_uniform_(tensor, 0.25, seed=seed, name=name)
        return tensor

    assert torch.equal(filled(1, "a"), filled(1, "a"))
    assert not torch.equal(filled(1, "a"), filled(2, "a"))
    assert not torch.equal(filled(1, "a"), filled(1, "b"))
    weights = filled(1, "a")
    assert float(weights.abs().max()) <= 0.25
    assert abs(float(weights.mean())) < 4 * 0.25 / (3 * 1200) ** 0.5
    assert float(weights.std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_a_large_tensor_is_filled_like_its_chunks():
    large = torch.empty((1 << 18) + 5)
    rng.fill_uniform_(large, 1.0, seed=1, name="a")
    small = torch.empty(7)
    rng.fill_uniform_(small, 1.0, seed=1, name="a")
    assert torch.equal(large[:7], small)
    assert large[1 << 18 :].unique().numel() == 5
    assert not torch.equal(large[1 << 18 :], small[:5])


@pytest.mark.parametrize("threshold", [0, 1, 20_000, 65_535])
def test_units_draw_the_halves_of_a_hash(threshold):
    keys, units = keys_of(50), rng.unit_keys(rng.layer_words("a"), 12)
    hashes = [[lowbias32(first ^ unit, second) for unit in units.tolist()] for first, second in keys.tolist()]
    expected = [[h % 2**16 >= threshold for h in row] + [h >> 16 >= threshold for h in row] for row in hashes]
    assert rng.at_least16(keys, units, threshold).tolist() == expected


def test_each_use_of_a_layer_has_keys_of_its_own():
    words = rng.layer_words("a")
    assert torch.equal(rng.unit_keys(words, 9), rng.unit_keys(words, 9, use=0))
    keys = torch.cat([rng.unit_keys(words, 2000, use=use) for use in range(50)])
    assert len(keys.unique()) > 50_000 - 10  # about one collision by chance
