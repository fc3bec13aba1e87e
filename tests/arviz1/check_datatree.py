"""The ArviZ >= 1 adapter on a saved nested dict; needs numpy, arviz >= 1, h5netcdf and h5py, no torch and no Pyro.

    python check_datatree.py nested.pkl      (run by `make test-arviz1` through tests/test_export.py)
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import tempfile
from pathlib import Path


def main(path: str) -> None:
    import arviz as az
    import numpy as np
    import xarray as xr

    assert int(az.__version__.split(".")[0]) >= 1, f"ArviZ {az.__version__} is the old one"
    assert importlib.util.find_spec("torch") is None, "this environment must do without torch"
    # By path: the file stands alone.
    source = Path(__file__).parents[2] / "pyrovae" / "arviz_adapters.py"
    spec = importlib.util.spec_from_file_location("arviz_adapters", source)
    assert spec is not None
    assert spec.loader is not None
    adapters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapters)

    nested = pickle.loads(Path(path).read_bytes())
    tree = adapters.to_datatree(nested, {"data": ["a", "b", "c"]})
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == set(nested)
    summary = az.summary(tree, var_names=["s"])
    assert list(summary.index) == ["s[a]", "s[b]", "s[c]"]
    with tempfile.TemporaryDirectory() as folder:
        tree.to_netcdf(f"{folder}/a.nc", engine="h5netcdf")
        back = az.from_netcdf(f"{folder}/a.nc")
        for group, variables in nested.items():
            for name, (dims, array) in variables.items():
                assert back[group][name].dims == dims
                np.testing.assert_array_equal(back[group][name].values, array)
    print(f"DataTree of {len(nested)} groups round-trips under ArviZ {az.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
