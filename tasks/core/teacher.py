"""Whether a teacher is worth compressing. It is a warning that stands first wherever its numbers are read; nothing stops.

All that follows is relative to the teacher. A tolerated loss of 5 % of a FID that is MOST_FID times that of as many real images
is as much as all that they score: a bound like that says nothing of how good images are, and a student of noise makes noise as
well as its teacher. A teacher that covers less of the data than LEAST_RECALL of what as many real images cover leaves out kinds
of images, which no student brings back.
"""

import re
from collections.abc import Mapping

MOST_FID = 20       # times the FID of as many real images
LEAST_RECALL = 0.5  # of the recall of as many real images
NOT_WORTH = "The teacher is not worth compressing"
FID = re.compile(r"fid_\d+k?")


def doubt(numbers: Mapping[str, float]) -> str | None:
    """Why it is not, as a sentence; None where nothing speaks against it.

    numbers: what pretrain_load reports of the teacher's own samples: fid_<n>, recall, and <name>_real of each, of as many real
    images. What was not measured says nothing.
    """
    reasons = []
    name = next((key for key in numbers if FID.fullmatch(key) and f"{key}_real" in numbers), None)
    if name and numbers[name] > MOST_FID * numbers[f"{name}_real"]:
        reasons.append(f"its {name} is {numbers[name]:.3g}, where as many real images score {numbers[f'{name}_real']:.3g} and "
                       f"{MOST_FID} times that is the most")
    if "recall_real" in numbers and numbers["recall"] < LEAST_RECALL * numbers["recall_real"]:
        reasons.append(f"its recall is {numbers['recall']:.3f}, where as many real images have {numbers['recall_real']:.3f} "
                       f"and {LEAST_RECALL} of that is the least")
    return f"{NOT_WORTH}: {'; '.join(reasons)}. What is said of its compressed forms is relative to that." if reasons else None
