"""Single loops: parameters, adjoint and hyperparameters move together, one step each."""

from bilevel.outer.single_loop.amigo import amigo as amigo
from bilevel.outer.single_loop.base import Anchored as Anchored
from bilevel.outer.single_loop.base import Indexed as Indexed
from bilevel.outer.single_loop.fsla import fsla as fsla
from bilevel.outer.single_loop.loop import single_loop as single_loop
from bilevel.outer.single_loop.memory import Saga as Saga
from bilevel.outer.single_loop.mrbo import mrbo as mrbo
from bilevel.outer.single_loop.recursion import Page as Page
from bilevel.outer.single_loop.recursion import Spider as Spider
from bilevel.outer.single_loop.recursion import Storm as Storm
from bilevel.outer.single_loop.saba import saba as saba
from bilevel.outer.single_loop.soba import soba as soba
from bilevel.outer.single_loop.spaba import spaba as spaba
from bilevel.outer.single_loop.srba import srba as srba
from bilevel.outer.single_loop.step import SingleLoopState as SingleLoopState
from bilevel.outer.single_loop.stocbio import stocbio as stocbio
