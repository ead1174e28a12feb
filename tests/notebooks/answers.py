"""Right and wrong answers to every exercise of the lectures, as source text: {lecture: {number: (right, wrong)}}.

Among the wrong ones are those that a student gives who has misunderstood one thing, and those that an earlier check took.
"""

ANSWERS = {
    "01_dp_sgd_by_hand.ipynb": {
        1: (
            [
                "lambda g, C: g * np.minimum(1, C / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-12))",
                "lambda g, C: np.multiply(g, np.minimum(1, C / (np.linalg.norm(g, axis=1, keepdims=True) + 1e-12)), out=g)",
                "lambda g, C: np.array([x if np.linalg.norm(x) <= C else C * x / np.linalg.norm(x) for x in g])",
            ],
            [
                "lambda g, C: np.clip(g, -C, C)",
                "lambda g, C: g * min(1, C / np.linalg.norm(g))",
                "lambda g, C: g * C / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-12)",
                "lambda g, C: g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), C)",
                "lambda g, C: g",
                "lambda g: g",
            ],
        ),
        2: (
            ["lambda sigma: normal_cdf(1 / (2 * sigma))", "lambda sigma: 1 - normal_cdf(-0.5 / sigma)"],
            [
                "lambda sigma: normal_cdf(1 / sigma**2)",
                "lambda sigma: normal_cdf(sigma / 8)",
                "lambda sigma: 0.598706",
                "lambda sigma: normal_cdf(1 / sigma)",
                "lambda sigma: normal_cdf(-1 / (2 * sigma))",
            ],
        ),
        3: (
            ['{"a", "c", "e", "f"}', '["f", "c", "e", "a"]', '"A, C, E, F"'],
            ['{"a", "e", "f"}', 'set("abcdef")', 'set("bd")', '"b"', "7"],
        ),
        4: (
            [
                "privacy.calibrate_noise(privacy.PrivacyBudget(1.0, delta), q, steps)",
                "1.01 * privacy.calibrate_noise(privacy.PrivacyBudget(1.0, delta), q, steps)",
            ],
            [
                "noise_multiplier",
                "0.9 * privacy.calibrate_noise(privacy.PrivacyBudget(1.0, delta), q, steps)",
                "1.2 * privacy.calibrate_noise(privacy.PrivacyBudget(1.0, delta), q, steps)",
                "privacy.calibrate_noise(privacy.PrivacyBudget(1.0, delta), 1.0, steps)",
                "0",
                '"4"',
            ],
        ),
    },
    "02_spending_a_budget.ipynb": {
        1: (["26.0", "100 * (1 - f_gauss(0.05, 1.0))"], ["6.119", "74.0", "0.26", "5", "13.6"]),
        2: (["13.6", "100 * (math.e * 0.05 + 1e-5)"], ["86.4", "0.136", "5", "26.0", "5 + math.e"]),
        3: (["100", "100.0"], ["10", "1000", "math.sqrt(10)", "99"]),
        4: (["(1312, 187)", "[1312, 187]"], ["(1312, 1125)", "(187, 1312)", "1312", "(1313, 187)", "(1125, 187)"]),
    },
    "03_clipping_and_views.ipynb": {
        1: (["9", "9.0"], ["1", "20", "11", "-9", "10"]),
        2: (
            ["(10, 160)", "[10.0, 160.0]"],
            ["(160, 10)", "(10, 10)", "(10, 40)", "10", "(10 * 4096, 160 * 4096)"],
        ),
        3: (
            ['"ekyzi,ekyzo->eio"', '"eabci, eabco -> eio"'],
            ['"ekyzi,ekyzo->eoi"', '"ekyzi,ekyzo->io"', '"ekyzi,ekyzo->ekio"', '"e"', '"ekyzi,ekzyo->eio"'],
        ),
    },
    "04_break_it.ipynb": {
        1: (["1 / 3", "0.33"], ["3", "1", "1 / math.sqrt(3)", "1 / 9", "0.3"]),
        2: (
            [
                "lambda x: (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 0.1)",
                "lambda x: (np.asarray(x) - np.mean(x, 1, keepdims=True)) / (np.std(x, 1, keepdims=True) + 0.01)",
            ],
            [
                "batch_norm",
                "lambda x: x",
                "lambda x: x - x.mean(1, keepdims=True)",
                "lambda x: (x - x.mean()) / x.std()",
                "lambda x: x / x.std(1, keepdims=True)",
                "lambda x: (x - x.mean(1, keepdims=True)) / x[0].std()",
                "lambda x: (x - x.mean(1, keepdims=True)) / x[-1].std()",
                "lambda x: (x - x.mean(1, keepdims=True)) / jnp.std(x[:2])",
            ],
        ),
        3: (
            [
                "lambda k: privacy.epsilon(privacy.Mechanism(SIGMA, Q), k, DELTA)",
                "lambda k: privacy.epsilon_curve(privacy.Mechanism(SIGMA, Q), [k], DELTA)[0]",
            ],
            [
                "lambda k: k * stated",
                "lambda k: stated",
                "lambda k: math.sqrt(k) * stated",
                "lambda k: privacy.epsilon(privacy.Mechanism(SIGMA / k, Q), 1, DELTA)",
            ],
        ),
        4: (["16", "16.0"], ["4", "2", "256", "0.25"]),
    },
    "05_audit.ipynb": {
        1: (
            [
                "math.log((stats.beta.ppf(0.005, 420, 81) - 0.01) / stats.beta.ppf(0.995, 61, 440))",
                "round(math.log((stats.beta.ppf(0.005, 420, 81) - 0.01) / stats.beta.ppf(0.995, 61, 440)), 3)",
            ],
            [
                "math.log((0.84 - 0.01) / 0.12)",
                "math.log((stats.beta.ppf(0.01, 420, 81) - 0.01) / stats.beta.ppf(0.99, 61, 440))",
                "math.log(stats.beta.ppf(0.005, 420, 81) / stats.beta.ppf(0.995, 61, 440))",
                "math.log((stats.beta.ppf(0.005, 420, 81) - 0.01) / 0.12)",
                "0",
            ],
        ),
        2: (["95", "int(95.0)"], ["94", "96", "100", "math.log(0.01)", "5"]),
        3: (["1 - 0.01 / 50", "0.9998"], ["0.99", "0.0002", "0.99**50", "0.999", "0.99 / 50"]),
    },
    "06_reading_the_paper.ipynb": {
        1: (
            [
                'sum(shown(row) == "helps" for _, row in steps.iterrows())',
                'float(sum(shown(row) == "helps" for _, row in steps.iterrows()))',
            ],
            [
                'sum(shown(row) == "helps" for _, row in steps.iterrows()) + 1',
                "len(steps)",
                'sum(steps["points"] > 0)',
                '"all"',
                "True",
            ],
        ),
        2: (["6", "6.0"], ["5", "7", "5.78", "3"]),
        3: (
            [
                '100 * (1 - privacy.calibrate_noise(privacy.PrivacyBudget(1.0, 1e-5), 4096 / 50_000, 875, "pld") / 10)',
                'round(100 - 10 * privacy.calibrate_noise(privacy.PrivacyBudget(1.0, 1e-5), 4096 / 50_000, 875, "pld"), 1)',
            ],
            [
                'privacy.calibrate_noise(privacy.PrivacyBudget(1.0, 1e-5), 4096 / 50_000, 875, "pld")',
                "0",
                "17",
                '1 - privacy.calibrate_noise(privacy.PrivacyBudget(1.0, 1e-5), 4096 / 50_000, 875, "pld") / 10',
            ],
        ),
    },
}  # fmt: skip
