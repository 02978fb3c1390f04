"""Weight forensics: how was a model made, judged from its weights?"""
