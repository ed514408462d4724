"""Platforms: which image is chosen for a platform that somebody asks for."""

from __future__ import annotations

import platform

import pytest

from cachedb.oci.platforms import choose_platform, host_platform, is_for


def choose(labels: str, wanted: str) -> str | None:
    return choose_platform([(label, label) for label in labels.split()], wanted)


@pytest.mark.parametrize(
    ("wanted", "label"),
    [
        ("linux/amd64", "linux/amd64"),
        ("arm64", "linux/arm64"),
        ("linux/aarch64", "linux/arm64/v8"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm64", "linux/aarch64"),
        ("X86_64", "linux/amd64"),
        ("linux/x86-64", "linux/amd64/v1"),
        ("i386", "linux/386"),
        ("armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/7", "linux/arm"),
        ("Linux/ARM/V7", "linux/arm/v7"),
        ("macos/arm64", "darwin/arm64"),
        ("riscv64", "linux/riscv64"),
        ("linux/ppc64le", "linux/ppc64le/power9"),
        ("linux/amd64", "linux/amd64/v3"),
    ],
)
def test_a_platform_is_known_by_its_other_names(wanted: str, label: str) -> None:
    assert is_for(label, wanted)


@pytest.mark.parametrize(
    ("wanted", "label"),
    [
        ("linux/amd64", None),
        ("linux/amd64", "unknown/unknown"),
        ("linux/amd64", "linux/386"),
        ("linux/arm64", "linux/arm/v7"),
        ("linux/amd64/v2", "linux/amd64/v3"),
        ("linux/arm64/v8", "linux/arm64/v9"),
        ("linux/arm64/v9", "linux/arm64/v8.6"),
        ("linux/ppc64le/power8", "linux/ppc64le/power9"),
        ("linux/amd64", "windows/amd64"),
        ("linux/amd64/v1/x", "linux/amd64"),
        ("linux", "windows/amd64"),
        ("", "linux/amd64"),
        ("linux/amd64", "amd64"),
    ],
)
def test_another_platform_does_not_fit(wanted: str, label: str | None) -> None:
    assert not is_for(label, wanted)


@pytest.mark.parametrize(
    ("labels", "wanted", "chosen"),
    [
        ("linux/amd64 linux/amd64/v2 linux/amd64/v3 linux/amd64/v4", "linux/amd64/v3", "linux/amd64/v3"),
        ("linux/amd64 linux/amd64/v2 linux/amd64/v4", "linux/amd64/v3", "linux/amd64/v2"),
        ("linux/amd64/v4 linux/amd64", "linux/amd64/v3", "linux/amd64"),
        ("linux/amd64/v3 linux/amd64/v2 linux/amd64", "linux/amd64", "linux/amd64"),
        ("linux/amd64/v3 linux/amd64/v2", "linux/amd64", "linux/amd64/v2"),
        ("linux/arm/v5 linux/arm/v6 linux/arm/v8", "linux/arm", "linux/arm/v6"),
        ("linux/arm64/v8 linux/arm64/v8.5", "linux/arm64/v9", "linux/arm64/v8.5"),
    ],
)
def test_the_nearest_lower_variant_is_chosen(labels: str, wanted: str, chosen: str) -> None:
    assert choose(labels, wanted) == chosen


def test_the_first_of_two_equal_platforms_is_chosen() -> None:
    assert choose_platform([(1, "linux/amd64"), (2, "linux/amd64/v1")], "amd64") == 1


@pytest.mark.parametrize(
    ("machine", "name"), [("x86_64", "linux/amd64"), ("armv7l", "linux/arm/v7"), ("s390x", "linux/s390x")]
)
def test_an_operating_system_alone_means_the_architecture_of_the_host(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host_platform() == name
    assert is_for(name, "linux")
    assert is_for(name.replace("linux", "windows"), "Windows")
