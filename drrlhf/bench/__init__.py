"""The benchmark harness behind ``drrlhf bench``.

`registry` says what a case is; each op's module makes its cases at the shapes of a suite; `runner`
holds a case against float64 (`gate`), then times its implementations side by side in one process
(`timing`) and meters their peak memory (`memory`); `results`, `table` and `plots` keep and show
what came out. A speed is never shown for a result that is wrong, and an implementation that cannot
run is listed with the reason.
"""
