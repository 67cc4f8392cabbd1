from distributed.host.versions import versions


def test_versions_include_python_torch_and_numpy():
    assert {"python", "torch", "numpy"} <= versions().keys()
    assert "not installed" not in versions().values()
