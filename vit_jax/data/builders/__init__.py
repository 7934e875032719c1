"""The TFDS dataset builders of this package: one module per dataset, with the dataset's name."""
