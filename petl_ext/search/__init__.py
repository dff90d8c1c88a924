"""Searches that choose, while a model trains, what of it a task needs.

bandit.py knows no model; search.py is the search, which is given a choice (choice.py): depth.py has that of DAS,
placement.py that of KAB-APP. comparing.py measures options, state.py keeps what is found, beginning.py measures what a
search may begin with.
"""

from petl_ext.search.bandit import Bandit
from petl_ext.search.beginning import block_influence, one_by_one
from petl_ext.search.choice import OneArm, SeveralArms
from petl_ext.search.constants import Constants
from petl_ext.search.depth import DepthConstants, DepthSearch
from petl_ext.search.placement import PlacementConstants, PlacementSearch
from petl_ext.search.search import Search

__all__ = [
    "Bandit",
    "Constants",
    "DepthConstants",
    "DepthSearch",
    "OneArm",
    "PlacementConstants",
    "PlacementSearch",
    "Search",
    "SeveralArms",
    "block_influence",
    "one_by_one",
]
