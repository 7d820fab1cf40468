"""The stages as LightningModules: predict loops that write records and return nothing."""
