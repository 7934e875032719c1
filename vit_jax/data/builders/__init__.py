"""TFDS dataset builders that this package ships: one module a dataset, named as the dataset."""
