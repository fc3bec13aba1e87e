"""Export to ArviZ, old and new; and an `import pyrovae` that loads nothing heavy."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from bench import problems

from pyrovae import LatentSpace, evidence, export, guides, reference
from pyrovae.errors import IncompatibleError, NoDensityError
from pyrovae.nets import MLP

ROOT = Path(__file__).parent.parent
ARVIZ1 = Path(os.environ.get("PYROVAE_ARVIZ1", ROOT / "build" / "arviz1"))


@pytest.fixture(scope="module")
def local():
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    truth = reference.nuts(problems.gamma_normal, x, num_samples=40, warmup=30)
    torch.manual_seed(0)
    guide = guides.Amortized(problems.gamma_normal, MLP([3, 6]))
    draws = {"amortized": guide.draws(50, x), "semi-amortized (tuned)": guide.draws(50, x)}
    return x, truth, draws


def test_dims_of_a_local_model(local):
    x, truth, draws = local
    groups = export.nested(truth, draws, {"x": x})
    assert set(groups) == {
        "posterior", "sample_stats", "observed_data", "posterior_amortized", "posterior_semi_amortized_tuned"
    }  # fmt: skip
    assert groups["posterior"]["s"][0] == ("chain", "draw", "data")
    assert groups["posterior"]["z"][0] == ("chain", "draw", "data", "z_dim_0")
    assert groups["posterior"]["z"][1].shape == (2, 40, 3, 2)
    assert groups["sample_stats"]["lp"][0] == ("chain", "draw", "data")
    assert groups["observed_data"]["x"][0] == ("data", "x_dim_0")
    assert groups["posterior_amortized"]["s"][1].shape == (1, 50, 3)
    assert (groups["posterior"]["s"][1] > 0).all()  # the model's own space
    np.testing.assert_allclose(groups["posterior"]["s"][1], truth.draws[..., 0].exp().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(groups["posterior"]["z"][1], truth.draws[..., 1:].numpy())


def test_round_trip_through_netcdf(local, tmp_path):
    x, truth, draws = local
    export.save(tmp_path / "a.nc", truth, draws, {"x": x}, coords={"data": ["a", "b", "c"]})
    found = az.from_netcdf(tmp_path / "a.nc")
    np.testing.assert_array_equal(found.posterior["z"].values, truth.draws[..., 1:].numpy())
    np.testing.assert_array_equal(found.sample_stats["lp"].values, truth.lp.numpy())
    np.testing.assert_array_equal(found.observed_data["x"].values, x.numpy())
    np.testing.assert_allclose(
        found["posterior_semi_amortized_tuned"]["s"].values[0], draws["semi-amortized (tuned)"][..., 0].detach().exp()
    )
    assert list(found.posterior["data"].values) == ["a", "b", "c"]
    assert found.posterior["z"].sel(data="b").shape == (2, 40, 2)
    summary = az.summary(found, var_names=["s"])
    assert list(summary.index) == ["s[a]", "s[b]", "s[c]"]
    np.testing.assert_allclose(summary["mean"], truth.samples()["s"].mean((0, 1)), atol=6e-4)  # three decimals


def test_statistics_of_chains_and_guides(local):
    """lp, energy and diverging of batched HMC; lp, log_q and k-hat of a guide; ArviZ's k-hat is ours."""
    x, _, _ = local
    chains = reference.hmc(problems.gamma_normal, x, progress=False, target_ess=100)
    torch.manual_seed(0)
    guide = guides.Amortized(problems.gamma_normal, MLP([3, 6]))
    found = export.drawn(guide, x, num_samples=400)
    idata = export.to_arviz(chains, {"amortized": found}, {"x": x})
    stats = idata.sample_stats
    assert set(stats.data_vars) == {"lp", "energy", "diverging"}
    assert stats["energy"].dims == stats["diverging"].dims == ("chain", "draw", "data")
    assert (stats["energy"].values >= -stats["lp"].values - 30).all()
    np.testing.assert_array_equal(stats["diverging"].values, chains.chains.diverging.numpy())
    mine = idata["sample_stats_amortized"]
    assert set(mine.data_vars) == {"lp", "log_q", "khat"}
    torch.testing.assert_close(found.lp - found.log_q, evidence.log_weights(
        problems.gamma_normal, guide, x, num_samples=400).float(), rtol=1e-4, atol=1e-4)  # fmt: skip
    _, khat = az.psislw((mine["lp"] - mine["log_q"]).values[0].T.astype(float))
    np.testing.assert_allclose(khat, mine["khat"].values, rtol=1e-4)
    assert len(az.summary(idata, var_names=["s"])) == 3
    alone = export.to_arviz(guides={"amortized": found}, space=guide.space(x))
    assert set(alone.groups()) >= {"posterior", "sample_stats"}
    with pytest.raises(NoDensityError, match=r"guide\.draws"):
        export.drawn(guides.ShortRun(problems.gamma_normal, num_steps=2), x)


def test_leave_one_out_in_joint_mode_only(local):
    """Eight schools: az.loo on the pointwise log-likelihood, each school's by hand; a data plate is refused."""
    model = problems.eight_schools()
    chains = reference.hmc(model, plate=None, progress=False, target_ess=200)
    pointwise = export.log_likelihood(chains.space, chains.draws)
    ((site, values),) = pointwise.items()
    assert values.shape == (8, 50, 8)
    sites = chains.samples()
    y, sigma = problems.SCHOOLS
    theta = sites["mu"].unsqueeze(-1) + sites["tau"].unsqueeze(-1) * sites["eta"]
    torch.testing.assert_close(values, dist.Normal(theta, sigma).log_prob(y), rtol=1e-4, atol=1e-4)
    found = az.loo(export.to_arviz(chains, pointwise=pointwise))
    assert -33 < found.elpd_loo < -29  # about -30.8 for this model
    assert found.n_data_points == 8
    x, truth, _ = local
    with pytest.raises(IncompatibleError, match="held-out data"):
        export.log_likelihood(truth.space, truth.draws, x)
    assert site


def test_trace_plot(local):
    import matplotlib as mpl

    mpl.use("Agg")
    _, truth, _ = local
    axes = az.plot_trace(export.to_arviz(truth), var_names=["s"])
    assert axes.shape == (1, 2)
    mpl.pyplot.close("all")


def _inner_plate(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("time", 4):
            b = pyro.sample("b", dist.Normal(a, 1.0).expand([4, len(x)]))
            c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).expand([4, len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(b + c.sum(-1), 1.0), obs=x.T)


def test_dims_of_inner_plates():
    """The inner plate's dimension stands left of the data's, as in the program; values lie where they belong."""
    x = torch.zeros(3, 4)
    space = LatentSpace(_inner_plate, x)
    u = torch.randn(7, 3, space.dim)
    group = export.nested(guides={"any": u}, space=space)["posterior"]
    assert group["a"][0] == ("chain", "draw", "data")
    assert group["b"][0] == ("chain", "draw", "time", "data")
    assert group["c"][0] == ("chain", "draw", "time", "data", "c_dim_0")
    assert group["c"][1].shape == (1, 7, 4, 3, 2)
    np.testing.assert_array_equal(group["b"][1][0], space.constrain(u)["b"].numpy())
    assert export.to_arviz(guides={"any": u}, space=space).posterior.sizes["time"] == 4


def test_dims_of_joint_mode():
    model = problems.eight_schools()
    truth = reference.nuts(model, plate=None, num_samples=20, warmup=20)
    groups = export.nested(truth, observed={"y": problems.SCHOOLS[0]})
    assert groups["posterior"]["mu"][0] == ("chain", "draw")
    assert groups["posterior"]["eta"][0] == ("chain", "draw", "J")
    assert groups["posterior"]["eta"][1].shape == (2, 20, 8)
    assert groups["observed_data"]["y"][0] == ("y_dim_0",)
    schools = [f"school {i}" for i in range(8)]
    found = export.to_arviz(truth, observed={"y": problems.SCHOOLS[0]}, coords={"J": schools})
    assert list(found.posterior["J"].values) == schools
    assert (found.posterior["tau"].values > 0).all()


def test_one_guide_alone_is_the_posterior(local):
    _, truth, draws = local
    found = export.to_arviz(guides={"amortized": draws["amortized"]}, space=truth.space)
    assert found.groups() == ["posterior"]
    assert found.posterior.sizes == {"chain": 1, "draw": 50, "data": 3, "z_dim_0": 2}
    with pytest.raises(ValueError, match="latent space"):
        export.nested(guides=draws)
    clash = {"short-run": draws["amortized"], "short run": draws["amortized"]}
    with pytest.raises(ValueError, match="posterior_short_run"):
        export.nested(guides=clash, space=truth.space)


def test_newer_arviz(local, tmp_path):
    """The adapter for ArviZ >= 1 runs in its own small environment, without torch (`make test-arviz1` builds it)."""
    python = ARVIZ1 / "bin" / "python"
    if not python.exists():
        reason = "no ArviZ >= 1 environment"
        pytest.skip(f"{reason} at {ARVIZ1}: `make test-arviz1` makes it where a python3.12 is found")
    x, truth, draws = local
    (tmp_path / "nested.pkl").write_bytes(pickle.dumps(export.nested(truth, draws, {"x": x})))
    script = Path(__file__).parent / "arviz1" / "check_datatree.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([python, script, tmp_path / "nested.pkl"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DataTree" in done.stdout


def test_import_is_light():
    """No plotting, data-set, ArviZ or model module comes with `import pyrovae`, nor with its light rooms."""
    code = (
        "import sys, pyrovae; from pyrovae import LatentSpace, fit, losses, reference, evidence\n"
        "heavy = ['matplotlib', 'torchvision', 'arviz', 'sklearn', 'pandas', 'xarray', 'pyrovae.models']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
