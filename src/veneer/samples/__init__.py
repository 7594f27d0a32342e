"""Small real models and texts that package registries carry, for the demo, the tests and the benchmarks.

One module a sample: `smollm2` (a causal language model), `albert` (a masked one) and `verses` (a text in two styles).
`samples.txt` in the repository pins the packages. Nothing is downloaded here: a package that is missing is named in
`veneer.errors.MissingSample`, together with the command that installs it.
"""
