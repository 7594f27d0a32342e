"""Small real models and texts that package registries carry, for the demo, the tests and the benchmarks.

One module a sample.
`samples.txt` in the repository pins the packages. Nothing is downloaded here: a package that is missing is named in
`veneer.errors.MissingSample`, together with the command that installs it.
"""
