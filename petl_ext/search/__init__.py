"""Searches that choose, while a model trains, what of it a task needs. bandit.py knows no model; depth.py is DAS."""

from petl_ext.search.bandit import Bandit
from petl_ext.search.depth import DepthSearch, SearchConstants

__all__ = ["Bandit", "DepthSearch", "SearchConstants"]
