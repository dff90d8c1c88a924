"""Searches that choose, while a model trains, what of it a task needs.

bandit.py knows no model; base.py is what searches have in common; depth.py is DAS, placement.py KAB-APP.
"""

from petl_ext.search.bandit import Bandit
from petl_ext.search.depth import DepthSearch, SearchConstants
from petl_ext.search.placement import PlacementConstants, PlacementSearch

__all__ = ["Bandit", "DepthSearch", "PlacementConstants", "PlacementSearch", "SearchConstants"]
