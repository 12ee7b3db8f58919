"""What all experiments share: data, records, budgets, black-box baselines, figures, the runner."""
