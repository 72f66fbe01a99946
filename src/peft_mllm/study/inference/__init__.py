"""What a study may claim: intervals, tests, groups, ranks, effects and fronts, as functions of plain arrays.

A group is the runs that differ in the seed alone. Its scores are an array (S, Q): of seed s on question q, in the
headline's unit (0 to 100). Groups that are compared have the same questions in the same order, and their seeds
are paired: row s of each has the same data order. Questions count as independent of one another; where several
are about one image, intervals are somewhat too narrow.
"""
