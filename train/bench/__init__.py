"""How fast is it: the step beside the machine's own rates and another trainer, its parts and laws, the loader."""
