"""Colours that are told apart by people who see colours differently, too (Okabe and Ito, 2008)."""

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
