"""Configurations: errors name file, line, key, value and what is allowed; whatever is valid is accepted."""

import copy
import json
import math

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import errors, paths, problems
from ntkbench.errors import BadInput
from ntkbench.measure import config as configuration
from ntkbench.measure import yaml_reader
from ntkbench.measure.config import Config
from ntkbench.studies import training

BLOCK = {"problems": ["digits_conv[N=4]"], "methods": ["hutchpp", "direct"], "metrics": ["trace"], "passes": [36, 72]}
FILES = sorted((paths.ROOT / "config").glob("*.yaml"))


def config(**changes):
    return Config.check({"profile": "test", "threads": 1, "grid": [BLOCK]} | changes, "test.yaml")


def refused(*said, **changes):
    with pytest.raises(BadInput) as caught:
        config(**changes)
    message = str(caught.value)
    assert message.startswith("test.yaml: ") and message.isprintable(), message
    for part in said:
        assert part in message


@pytest.fixture
def write(tmp_path):
    """Write text or bytes to a file."""

    def written(content, name="run.yaml"):
        file = tmp_path / name
        file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return file

    return written


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_configurations_are_valid_and_name_their_profile(file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Config.read(file).profile == file.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_written_configurations_read_back_the_same(tmp_path, file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    read = Config.read(file)
    written = configuration.write(read, tmp_path / "config.yaml")
    before = written.stat().st_mtime_ns
    assert Config.read(configuration.write(read, written)) == read
    assert written.stat().st_mtime_ns == before, "it is only written when it changed"


def test_a_study_inherits_settings_that_it_does_not_set():
    given = {"side_by_side": {"limits": {"time_s": 1}, "calls": 2}}
    chosen = config(dtype="float64", limits={"block_mb": 77, "time_s": 5}, studies=given).study("side_by_side")
    assert (chosen.dtype, chosen.calls, chosen.threads) == ("float64", 2, 1)
    assert (chosen.limits.block_mb, chosen.limits.time_s) == (77, 1)


def test_a_study_inherits_nothing_that_it_does_not_use():
    """So that its fingerprint and its provenance do not depend on it."""
    chosen = config(
        seeds=9, calls=9, dtype="float32", limits={"passes": 77, "gigaflop": 7}, studies={"effective_ranks": {}}
    ).study("effective_ranks")
    assert chosen == config(studies={"effective_ranks": {}}).study("effective_ranks")
    assert chosen.dtype == "float64"


@pytest.mark.parametrize(
    ("study", "given", "key"),
    [
        ("training", {"calls": 2}, "calls: 2: calls"),
        ("novak_flops", {"device": "cpu"}, "device: 'cpu': device"),
        ("novak_time", {"dtype": "float64"}, "dtype: 'float64': dtype"),
        ("effective_ranks", {"dtype": "float64"}, "dtype: 'float64': dtype"),
        ("side_by_side", {"limits": {"time_s": 3, "gigaflop": 3}}, "limits: limits.gigaflop"),
        ("time_to_error", {"limits": {"times_exact": 3}}, "limits: limits.times_exact"),
        ("hazelden_blog", {"direct_share": 0.1}, "direct_share: unknown key"),
    ],
)
def test_a_setting_that_a_study_does_not_use_is_refused_in_one_line(study, given, key):
    with pytest.raises(BadInput) as caught:
        config(studies={study: given})
    (line,) = str(caught.value).splitlines()
    assert f"studies.{study}.{key}" in line and ("has no effect on this study" in line or "unknown key" in line)


@given(st.data())
def test_every_spelling_of_a_label_becomes_one(data):
    sizes = data.draw(st.permutations(["N=3", "O=10", "width=8"]))
    spaces, zeros = st.sampled_from(["", " ", "  "]), st.sampled_from(["", "0", "00"])
    spelled = [part.replace("=", f"{data.draw(spaces)}={data.draw(spaces)}{data.draw(zeros)}") for part in sizes]
    label = f"{data.draw(spaces)}fc_relu[{f',{data.draw(spaces)}'.join(spelled)}]{data.draw(spaces)}"
    assert problems.check(label) == "fc_relu[N=3,width=8]"  # O=10 is the default
    assert config(grid=[BLOCK | {"problems": [label]}]).grid[0].problems == ["fc_relu[N=3,width=8]"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seedz": 3}, ["seedz", "did you mean 'seeds'", "threads"]),
        ({"limits": {"times_s": 3}}, ["limits.times_s", "did you mean 'time_s'", "gigaflop"]),
        ({"limits": 3}, ["limits", "3", "keys with values expected"]),
        ({"time_limit_s": 3}, ["time_limit_s", "unknown key", "limits"]),
        ({"device": "gpu"}, ["device", "'gpu'", "'auto', 'cpu' or 'cuda'"]),
        ({"device": "cdua"}, ["did you mean 'cuda'"]),
        ({"dtype": "bfloat16"}, ["dtype", "'bfloat16'", "float64"]),
        ({"seeds": 0}, ["seeds: 0", "greater than 0"]),
        ({"seeds": True}, ["seeds: True", "valid integer"]),
        ({"seeds": "20"}, ["seeds: '20'", "valid integer"]),
        ({"seeds": 20.0}, ["seeds: 20.0", "valid integer"]),
        ({"seeds": None}, ["seeds: None", "valid integer"]),
        ({"limits": {"time_s": math.inf}}, ["limits.time_s: inf", "finite"]),
        ({"limits": {"time_s": math.nan}}, ["limits.time_s: nan"]),
        ({"limits": {"time_s": True}}, ["limits.time_s: True", "valid number"]),
        ({"limits": {"time_s": "60"}}, ["limits.time_s: '60'", "valid number"]),
        ({"limits": {"memory_mb": 1e300}}, ["limits.memory_mb: 1e+300", "less than"]),
        ({"limits": {"passes": -1}}, ["limits.passes: -1", "greater than 0"]),
        ({"threads": 4096}, ["threads: 4096", "more threads than cores", "allowed: 1 to"]),
        ({"threads": 10**500}, ["threads", "more threads than cores"]),
        ({"shards": 0}, ["shards: 0"]),
        ({"retry": "all"}, ["retry: 'all'", "'none' or 'failed'"]),
        ({"grid": []}, ["grid and studies are both empty"]),
        ({"grid": None}, ["grid: None", "valid list"]),
        ({"grid": [3]}, ["grid[0]: 3", "keys with values expected"]),
        ({"profile": 3}, ["profile: 3", "valid string"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(changes, said):
    refused(*said, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"problems": ["digit_conv"]}, ["problems[0]: 'digit_conv'", "did you mean 'digits_conv'", "mlp_he"]),
        ({"problems": ["digits_conv[M=4]"]}, ["'M=4'", "N=<positive integer"]),
        ({"problems": ["digits_conv[N=257]"]}, ["N can be at most 256"]),
        ({"problems": ["digits_conv[N=0]"]}, ["'N=0'"]),
        ({"problems": ["digits_conv[N=٤]"]}, ["is not a size"]),
        ({"problems": [f"fc_relu[N={'9' * 5000}]"]}, ["N can be at most 999999999"]),
        ({"problems": ["fc_relu[N=1000000000000]"]}, ["N can be at most 999999999"]),
        ({"problems": ["digits_conv[N=4,N=4]"]}, ["N is given twice"]),
        ({"problems": ["mlp_hazelden[,]"]}, ["'mlp_hazelden[,]'", "'' is not a size"]),
        ({"problems": ["mlp_hazelden[]"]}, ["'' is not a size"]),
        ({"problems": ["mlp_hazelden[N=2,]"]}, ["'' is not a size"]),
        ({"problems": ["mlp_hazelden\n"]}, [r"'mlp_hazelden\n'", "malformed problem"]),
        ({"problems": ["mlp_hazelden[N=2\n]"]}, ["is not a size"]),
        ({"problems": ["\tmlp_hazelden"]}, ["malformed problem"]),
        ({"problems": ["digits_conv[N=4]", "digits_conv[N=04]"]}, ["'digits_conv[N=4]' is given twice"]),
        ({"problems": ["digits_conv", "digits_conv[N=256]"]}, ["'digits_conv' is given twice"]),
        ({"problems": ["rnn_flipflop[read=all]"]}, ["'read=all' is not a choice", "state or outputs"]),
        ({"problems": []}, ["problems: []", "at least 1"]),
        ({"problems": "digits_conv"}, ["problems: 'digits_conv'", "valid list"]),
        ({"problems": [4]}, ["problems[0]: 4", "valid string"]),
        ({"methods": ["hutch"]}, ["methods[0]: 'hutch'", "did you mean 'hutch", "direct"]),
        ({"methods": ["direct", "direct"]}, ["'direct' is given twice"]),
        ({"methods": "hutchpp"}, ["methods: 'hutchpp'", "valid list"]),
        ({"metrics": ["trac"]}, ["metrics[0]: 'trac'", "did you mean 'trace'", "effective_rank"]),
        ({"metrics": ["norm"], "methods": ["recurrent_exact_trace"]}, ["gives norm", "no cells"]),
        ({"passes": [36, 0]}, ["passes[1]: 0", "greater than 0"]),
        ({"passes": [36, 36]}, ["36 is given twice"]),
        ({"passes": [True]}, ["passes[0]: True", "valid integer"]),
        ({"passes": []}, ["passes: empty", "hutchpp"]),
        ({"passse": [3]}, ["grid[0].passse", "did you mean 'passes'"]),
        ({"seeds": 0}, ["grid[0].seeds: 0"]),
        ({"backends": "jax"}, ["backends: 'jax'", "'plain' or 'all'"]),
    ],
)
def test_a_wrong_block_of_the_grid_is_named(changes, said):
    refused("grid[0]", *said, grid=[BLOCK | changes])


TAKEN = ["reference", "cache", "asv", "asv-html", "asv-isolated", "x_reference"]
MALFORMED = ["Reference", "CACHE", "Smoke", "", " ", ".", "..", ".hidden", "-x", "_x", "a b", "a\n", "a/b", "../a"]
MALFORMED += ["/tmp/x", "a\\b", "a.b", "é", "x\0", "~", "$HOME", "a" * 65]


@pytest.mark.parametrize("name", TAKEN + MALFORMED)
def test_reserved_and_malformed_profile_names_are_refused(name):
    refused("profile: ", "taken; allowed: names other than" if name in TAKEN else "allowed: up to 64 of", profile=name)


@pytest.mark.parametrize("name", ["default", "paper_cpu", "x", "2024-05-01", "a" * 64])
def test_other_profile_names_are_accepted(name):
    assert config(profile=name).folder == name


@pytest.mark.parametrize(
    ("study", "given", "said"),
    [
        ("hazelden_trase", {}, ["did you mean 'hazelden_trace'"]),
        ("training", None, ["valid dictionary"]),
        ("training", {"tusk": "flipflop"}, [".tusk", "did you mean 'task'"]),
        ("training", {"ranks": [4, 128], "H": 64}, ["ranks: 128 is more than H (64)"]),
        ("training", {"H": 32}, ["ranks: 64 is more than H (32)"]),
        ("training", {"task": "delayed_response", "T": 4}, ["T of at least 5"]),
        ("training", {"parameters": "readout"}, ["read: outputs"]),
        ("training", {"gains": []}, ["gains: []", "at least 1"]),
        ("training", {"gains": [1, 1.0]}, ["given twice"]),
        ("training", {"threads": 4096}, ["threads: 4096", "more threads than cores"]),
        ("training", {"device": "tpu"}, ["device: 'tpu'", "'cuda'"]),
        ("training", {"limits": {"time": 3}}, ["training.limits.time", "did you mean 'time_s'"]),
        ("training", {"limits": {"time_s": "3"}}, ["training.limits.time_s: '3'"]),
        ("training", {"limits": 3}, ["training.limits: 3"]),
        ("recurrent_scaling", {"task": "match_to_sample", "T": [4, 10]}, ["T of at least 5"]),
        ("recurrent_scaling", {"middle": {"N": 100, "T": 10, "probes": 51}}, ["middle: probes"]),
        ("recurrent_scaling", {"middle": {"N": 100, "T": 10}}, ["middle: probes"]),
        ("recurrent_scaling", {"middle": {"M": 100}}, ["middle.M", "'N', 'T' or 'probes'"]),
        ("recurrent_scaling", {"probes": [1, 50]}, ["probes: [1, 50]", "takes at least"]),
        ("hazelden_trace", {"problems": {"mlp": "mlp_hazelden[N=51]"}}, ["problems.mlp", "at most 50"]),
        ("hazelden_trace", {"problems": {}}, ["problems", "at least 1"]),
        ("hazelden_trace", {"small": [5]}, ["small: [5]", "takes at least 6"]),
        ("hazelden_metrics", {"problems": ["digits"]}, ["problems[0]: 'digits'", "unknown problem"]),
        *(
            (study, {"problems": ["digits"]}, ["problems[0]: 'digits'", "unknown problem"])
            for study in ("effective_ranks", "language_training", "projections", "solves", "spectra")
        ),
        ("certificate_cost", {"estimates": [{"problem": "mlp_he", "method": "x"}]}, ["unknown method 'x'"]),
        (
            "certificate_cost",
            {"estimates": [{"problem": "mlp_he", "method": "direct", "metric": "trase"}]},
            ["estimates[0].metric", "'trase'"],
        ),
        ("hazelden_metrics", {"samples": [12, 12]}, ["12 is given twice"]),
        ("hazelden_blog", {"problem": "gru_hazelden[T=51]"}, ["problem: 'gru_hazelden[T=51]'", "at most 50"]),
        ("hazelden_blog", {"samples": [1]}, ["takes at least 2"]),
        ("mohamadi_cost", {"depths": [20]}, ["depths[0]: 20", "18, 34"]),
        ("mohamadi_quality", {"widths": {"fc": []}}, ["widths.fc: []", "at least 1"]),
        ("mohamadi_quality", {"widths": {"fc": [8, 8]}}, ["8 is given twice"]),
        ("mohamadi_quality", {"widths": {"vgg": [8]}}, ["widths.vgg", "'resnet18'"]),
        ("mohamadi_quality", {"steps": [1, 2]}, ["steps: [1, 2]"]),
        ("mohamadi_quality", {"train": 1286}, ["train: digits has 1285 training images; got 1286"]),
        ("mohamadi_drift", {"steps": 3, "looks": 5}, ["looks: 5"]),
        ("novak_images", {"side": 100}, ["side 100", "S/16"]),
        ("novak_images", {"depths": [], "wide_factors": [], "transformers": [], "mixers": []}, ["are all empty"]),
        ("novak_images", {"mixers": ["S/64"]}, ["mixers[0]: 'S/64'", "S/32"]),
        ("estimators_on_spectra", {"spectra": ["lineal"]}, ["spectra[0]", "did you mean 'linear'"]),
        ("estimators_on_spectra", {"n": 5}, ["n: 5", "20"]),
        (
            "side_by_side",
            {"comparisons": [{"problem": "mlp_hee"}]},
            ["comparisons[0].problem", "did you mean 'mlp_he'"],
        ),
        (
            "side_by_side",
            {"comparisons": [{"problem": "mlp_he", "rival": "x"}]},
            ["did you mean 'rivals'"],
        ),
        ("side_by_side", {"comparisons": [{"problem": "mlp_he", "rivals": ["x"]}]}, ["unknown method 'x'"]),
        ("time_to_error", {"goals": [{"problem": "mlp_he", "metric": "trase", "error": 0.1}]}, ["goals[0].metric"]),
        (
            "time_to_error",
            {"goals": [{"problem": "mlp_he", "metric": "trace", "error": True}]},
            ["goals[0].error: True"],
        ),
    ],
)
def test_settings_of_a_study_are_refused_before_it_runs(study, given, said):
    refused(f"studies.{study}", *said, studies={study: given})


def test_all_faults_are_reported_at_once_line_by_line():
    with pytest.raises(BadInput) as caught:
        config(studies={"training": {"H": 3, "T": "x"}, "novak_time": {"widths": [0, "y"]}})
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "studies.training.T",
        "studies.novak_time.widths[0]",
        "studies.novak_time.widths[1]",
    ]


def test_cuda_without_a_gpu_is_refused_for_the_run_and_for_a_study(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("device: 'cuda'", "allowed here: auto, cpu", device="cuda")
    refused("studies.training.device: 'cuda'", studies={"training": {"device": "cuda"}})


def test_a_study_whose_own_check_fails_is_one_line(monkeypatch):
    def validate(given, **_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(training.Settings, "model_validate", validate)
    refused("studies.training", "RuntimeError: first line", studies={"training": {}})


HEAD = "profile: x\nthreads: 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys with values are expected, but the file holds nothing"),
        ("# nothing\n", "the file holds nothing"),
        ("- a list\n", "the file holds a list"),
        ("profile\n", "the file holds a single value"),
        ("profile: x\n\tgrid: [\n", ":2: malformed YAML: found character '\\t'"),
        ("grid: [1, 2\n", ":2: malformed YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", ":2: malformed YAML: but found another document"),
        (HEAD + "grid: []\nstudies: {}\ngrid: []\n", ":5: the key 'grid' is given twice, first in line 3"),
        (HEAD + "grid:\n- problems: []\n  problems: []\n", ":5: the key 'problems' is given twice, first in line 4"),
        (HEAD + "studies: {training: {H: 3, 'H': 3}}\n", ":3: the key 'H' is given twice, first in line 3"),
        (HEAD + "1: 2\n", ":3: the key '1' is not text"),
        (HEAD + "true: 2\n", ":3: the key 'true' is not text"),
        (HEAD + "? {a: b}\n: 2\n", ":3: the key of several values is not text"),
        (HEAD + "? [a]\n: 2\n", ":3: the key"),
        (HEAD + "<<: {a: 1}\n", ":3: '<<' means merge in YAML"),
        (HEAD + "limits: {time_s: .inf}\n", ":3: '.inf' means float in YAML"),
        (HEAD + "limits: {time_s: .nan}\n", ":3: '.nan' means float in YAML"),
        (HEAD + "limits: {time_s: 1e999}\ngrid: []\n", ":3: limits.time_s: inf"),
        (HEAD + "seeds: 010\n", ":3: '010' means int in YAML"),
        (HEAD + "seeds: 0x10\n", ":3: '0x10' means int in YAML"),
        (HEAD + "seeds: 1_0\n", ":3: '1_0' means int in YAML"),
        (HEAD + "seeds: 1:30\n", ":3: '1:30' means int in YAML"),
        (HEAD + "profile2: 2024-01-01\n", ":3: '2024-01-01' means timestamp in YAML"),
        (HEAD + "seeds: yes\n", ":3: 'yes' means bool in YAML"),
        (HEAD + "seeds: true\ngrid: []\n", ":3: seeds: True"),
        (HEAD + "seeds: '20'\ngrid: []\n", ":3: seeds: '20'"),
        (HEAD + "seeds: !!int '20'\n", ":3: the tag"),
        (HEAD + "seeds: !!python/object/apply:os.system ['true']\n", ":3: the tag"),
        (HEAD + "studies: !!set {a}\n", ":3: the tag"),
        (HEAD + "grid: *unknown\n", ":3: malformed YAML: found undefined alias 'unknown'"),
        (HEAD + "grid: &a [*a]\n", "nested too deeply"),
        (HEAD + f"grid: {'[' * 40}{']' * 40}\n", ":3: nested too deeply"),
        (HEAD + f"grid: {'[' * 50_000}", "nested too deeply"),
        (HEAD + f"grid: {'{a: ' * 50_000}", "nested too deeply"),
        (HEAD + "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)), "more than"),
        (HEAD + "#" * 2**18, "larger than"),
        (HEAD + "seeds: \0\n", ":3: the character U+0000 is not allowed"),
        (HEAD + "seeds: \x07\n", ":3: the character U+0007 is not allowed"),
        ("\ufeff" + HEAD, ":1: begins with a byte order mark"),
        ((HEAD + "grid: []\n").encode("utf-16"), ":1: byte 0xff is not UTF-8"),
        (HEAD.encode() + b"# caf\xe9\n", ":3: byte 0xe9 is not UTF-8"),
        (HEAD + 'profile2: "\\ud800"\ngrid: []\n', ":3: profile2"),
        (HEAD + '"a\\nb": 1\ngrid: []\n', r":3: a\nb: unknown key 'a\nb'"),
        (
            HEAD + "grid:\n- {problems: [mlp_he], methods: [direct]}\n- {problems: [], methods: all}\n",
            ":5: grid[1].problems",
        ),
        (HEAD + "grid:\n- problems: [mlp_he]\n  metrics:\n  - trace\n  - trase\n", ":7: grid[0].metrics[1]: 'trase'"),
        (HEAD + "grid: []\nstudies:\n  training:\n    H: 3\n    T: x\n", ":7: studies.training.T: 'x'"),
        (HEAD + "grid: []\nlimit:\n  time_s: 3\n", ":4: limit: unknown key"),
        (HEAD + "grid:\n- methods: all\n", ":4: grid[0].problems: missing"),
        ("threads: 1\ngrid: []\n", ": profile: missing"),
    ],
)
def test_a_file_is_refused_with_its_name_and_line(write, text, said):
    file = write(text)
    with pytest.raises(BadInput) as caught:
        Config.read(file)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(file)) and line.isprintable() for line in lines), lines
    assert any(said in line for line in lines), lines
    if "malformed" in said or "means" in said:
        assert len(lines) == 1


@pytest.mark.parametrize("name", ["missing.yaml", "", "missing/run.yaml", "nul\0l.yaml"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
    with pytest.raises(BadInput, match="cannot be read: ") as caught:
        Config.read(tmp_path / name)
    assert str(caught.value).isprintable()


def test_plain_scalars_are_decimal_numbers_words_or_text(write):
    text = "a: 1\nb: -0\nc: 1e3\nd: .5\ne: +1.\nf: null\ng:\nh: true\ni: 1/i\nj: '1'\nk: 5 % ones, 1e-3\nl: 08\n"
    values, lines = yaml_reader.read(write(text))
    expected = {"a": 1, "b": 0, "c": 1000.0, "d": 0.5, "e": 1.0, "f": None, "g": None, "h": True}
    expected |= {"i": "1/i", "j": "1", "k": "5 % ones, 1e-3", "l": "08"}
    assert values == expected and {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in expected.items()}
    assert [lines[key,] for key in values] == list(range(1, 13))


def test_files_are_merged_key_by_key_and_the_command_line_wins(write):
    first = write("profile: a\nthreads: 1\nlimits: {time_s: 1, passes: 2}\ngrid: []\nstudies: {training: {N: 2}}\n")
    second = write("profile: b\nlimits: {passes: 3}\nstudies: {training: {T: 5}}\n", "other.yaml")
    merged = Config.of_files([first, second], {"seeds": 4, "limits": {"time_s": "9"}})
    assert (merged.profile, merged.seeds, merged.limits.time_s, merged.limits.passes) == ("b", 4, 9, 3)
    assert merged.studies == {"training": {"N": 2, "T": 5}}


def test_files_without_a_grid_override_keys_of_the_default(write):
    default, smoke = (paths.ROOT / "config" / f"{name}.yaml" for name in ("default", "smoke"))
    part = write("seeds: 5\nlimits: {time_s: 7}\n")
    made = Config.of_run([part])
    assert made == Config.of_files([default, part]) and (made.profile, made.seeds) == ("default", 5)
    assert Config.of_run([]) == Config.read(default) and Config.of_run([smoke]) == Config.read(smoke)
    assert Config.of_run([part], {"calls": 9}, default=smoke) == Config.of_files([smoke, part], {"calls": 9})
    assert Config.of_run([smoke, part]).seeds == 5
    with pytest.raises(BadInput, match=": profile: missing"):
        Config.of_run([part], {"grid": [BLOCK]})
    with pytest.raises(BadInput, match=r"part\.yaml:1: seeds: 0"):
        Config.of_run([write("seeds: 0\n", "part.yaml")])


@pytest.mark.parametrize(
    ("second", "overrides", "said"),
    [
        ("seeds: 0\n", {}, "{second}:1: seeds: 0: "),
        ("calls: 3\n", {}, "{first}:4: seeds: -1: "),
        ("seeds: 0\n", {"seeds": "x"}, "--config: seeds: 'x': "),
        ("seeds: 3\nseeds: 3\n", {"seeds": 3}, "{second}:2: the key 'seeds' is given twice, first in line 1"),
        ("seeds: 3\n", {"limits": {"time_s": ".inf"}}, "--config: limits.time_s: '.inf' means float in YAML"),
        ("seeds: 3\n", {"studies": {"training": {"H": "0"}}}, "--config: studies.training.H: 0: "),
        ("seeds: 3\ngrid:\n- methods: all\n", {}, "{second}:3: grid[0].problems: missing"),
    ],
)
def test_a_message_names_the_place_that_a_value_comes_from(write, second, overrides, said):
    first = write("profile: x\nthreads: 1\ngrid: [{problems: [mlp_he], methods: [direct]}]\nseeds: -1\n")
    other = write(second, "other.yaml")
    with pytest.raises(BadInput) as caught:
        Config.of_files([first, other], overrides)
    assert said.format(first=first, second=other) in str(caught.value)


VALID = {
    "profile": "test",
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "limits": {"time_s": 1, "memory_mb": 2.5, "block_mb": 1, "passes": 3, "gigaflop": 1},
    "seeds": 2,
    "calls": 2,
    "shards": 1,
    "retry": "none",
    "grid": [BLOCK | {"seeds": 1, "calls": 1, "backends": "plain"}],
    "studies": {
        "training": {"H": 4, "ranks": [2], "limits": {"time_s": 1}, "task": "flipflop"},
        "hazelden_trace": {"problems": {"mlp": "mlp_hazelden[N=2]"}, "small": [6]},
        "mohamadi_quality": {"widths": {"fc": [8]}, "steps": [0, 3]},
        "recurrent_scaling": {"N": [2], "T": [3], "probes": [8], "middle": {"N": 2, "T": 3, "probes": 8}},
        "novak_images": {"side": 32, "mixers": []},
    },
    "source": "measured",
}


def places(value, top=()):
    yield top
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in below:
        yield from places(inner, (*top, key))


ANY_TEXT = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["all", "x\ny", "mlp_he[]", "direct", "1"])
ANY_NUMBER = st.integers() | st.floats() | st.sampled_from([True, False, None, 10**400, -0.0, 1e300])
ANYTHING = st.recursive(
    ANY_TEXT | ANY_NUMBER,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)


def accepted_or_one_line_each(read, source):
    try:
        config = read()
    except BadInput as error:
        assert str(error), "a message"
        for line in str(error).split("\n"):
            assert line.startswith(source) and line.isprintable(), ascii(line)
    else:
        for name in config.studies:
            config.study(name)
            config.study(name).target()
        config.target()


@given(st.sampled_from(sorted(places(VALID), key=repr)), ANYTHING, st.one_of(st.none(), ANY_TEXT))
def test_any_value_in_any_place_is_accepted_or_named(place, value, key):
    raw = {"top": copy.deepcopy(VALID)}
    *above, last = ("top", *place)
    inside = raw
    for part in above:
        inside = inside[part]
    if key is not None and isinstance(inside[last], dict):
        inside[last][key] = value
    else:
        inside[last] = value
    accepted_or_one_line_each(lambda: Config.check(raw["top"], "test.yaml"), "test.yaml")


TEXT = yaml.safe_dump(VALID, sort_keys=False)


@given(
    st.integers(0, len(TEXT)),
    st.integers(0, 20),
    st.text(st.characters(codec="utf-8"), max_size=6)
    | st.sampled_from(
        ["\n", "\t", "- ", "a: ", "&a ", "*a", "!!x ", "{", "]", "'", '"', "# ", "---\n", "? ", "%YAML 1.2\n"]
    ),
)
def test_any_typo_in_a_file_is_accepted_or_named(tmp_path_factory, at, gone, put):
    file = tmp_path_factory.getbasetemp() / "slip.yaml"
    file.write_bytes((TEXT[:at] + put + TEXT[at + gone :]).encode())
    accepted_or_one_line_each(lambda: Config.read(file), str(file))


@given(st.binary(max_size=40))
def test_any_bytes_are_accepted_or_named(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    accepted_or_one_line_each(lambda: Config.read(file), str(file))


def test_a_command_prints_only_the_message(write, capsys):
    with pytest.raises(SystemExit) as ended, errors.as_one_line():
        Config.read(write("grid: ["))
    assert str(ended.value).startswith("ntkbench: ") and "\n" not in str(ended.value)


SCHEMA = paths.ROOT / "config" / "schema.json"


def test_the_committed_schema_is_current():
    assert SCHEMA.read_text(encoding="utf-8") == configuration.schema(), "`ntkbench schema --output config/schema.json`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_accepts_the_committed_configurations(file):
    jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), json.loads(configuration.schema()))


@pytest.mark.parametrize(
    "changes",
    [{"seedz": 1}, {"device": "gpu"}, {"seeds": 0}, {"grid": [BLOCK | {"methods": "some"}]}, {"limits": {"time": 1}}],
)
def test_the_schema_refuses_unknown_keys_and_values(changes):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"profile": "x", "grid": [BLOCK]} | changes, json.loads(configuration.schema()))
