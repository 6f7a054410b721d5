"""Shipped configurations, data only: ``nest_fn.config.Config.preset("nest_large")`` reads them."""
