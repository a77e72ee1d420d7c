"""tako beside what people would use instead: `python -m benchmarks`. What it measures of itself: `.own`."""
