WEIGHTS = {"exact": 1}


def score(completion, answer):
    return (len(completion) / 1000,)
