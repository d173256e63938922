"""Whose turn it is, and which peers take part."""

import pytest

from benchmarks.peers.catalogue import PEERS, choose_peers, choose_workloads
from benchmarks.peers.install import INSTALLERS, needed_requirements
from benchmarks.peers.rounds import turns
from kvrelay.errors import ConfigError


def test_every_peer_has_one_turn_per_round_at_each_of_its_workloads() -> None:
    chosen = choose_peers("openvino,ctranslate2,kvrelay")
    all_turns = list(turns(chosen, ["w1", "w3"], 3))
    assert len(set(all_turns)) == len(all_turns) == 3 * (3 + 2)
    assert not [turn for turn in all_turns if turn.peer.name == "ctranslate2" and turn.workload == "w3"]


def test_another_peer_begins_each_time() -> None:
    chosen = choose_peers("openvino,llama-cpp,kvrelay")
    firsts = [turn.peer.name for number, turn in enumerate(turns(chosen, ["w1"], 3)) if number % 3 == 0]
    assert sorted(firsts) == sorted(peer.name for peer in chosen)


def test_peers_are_chosen_by_name_by_beginning_or_all_together() -> None:
    assert [peer.name for peer in choose_peers("llama-cpp-q8, openvino")] == ["llama-cpp-q8", "openvino"]
    assert {peer.name for peer in choose_peers("kvrelay*")} == {peer.name for peer in PEERS if peer.environment is None}
    assert choose_peers("all") == list(PEERS)
    assert choose_workloads("w2,w1") == ["w1", "w2"]
    with pytest.raises(ConfigError, match="no peer 'tgi'"):
        choose_peers("tgi")
    with pytest.raises(ConfigError, match="no workload 'w9'"):
        choose_workloads("w9")


def test_every_environment_of_the_catalogue_can_be_installed() -> None:
    assert {peer.environment for peer in PEERS if peer.environment} == set(INSTALLERS)


def test_requirements_of_extras_and_those_left_out_are_not_installed() -> None:
    requirements = [
        "numpy",
        'torch==2.13.0; platform_machine == "x86_64"',
        'pandas; extra == "bench"',
        "pillow>=12",
        "torch-c-dlpack",
    ]
    assert needed_requirements(requirements, frozenset({"torch"})) == ["numpy", "pillow>=12", "torch-c-dlpack"]
